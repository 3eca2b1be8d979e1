"""Crosses of parameters: with `-m slow` every combination, and always a few that have each value at least once."""

import itertools

import pytest


def cross(*often, **axes):
    """Parametrize by the product of `axes`, lists of values or dicts of values by id; what is not `often` is slow.

    `often` are ids of combinations, such as "nf4-True". Without any, the axes are walked in step, the shorter ones from
    their start again, until the longest is at its end.
    """
    named = [axis if isinstance(axis, dict) else {_id(value): value for value in axis} for axis in axes.values()]
    assert all(len(axis) == len(given) for axis, given in zip(named, axes.values(), strict=True)), "ids are unique"
    in_step = {tuple(list(axis)[row % len(axis)] for axis in named) for row in range(max(map(len, named)))}
    combinations = list(itertools.product(*named))
    chosen = {ids for ids in combinations if "-".join(ids) in often} if often else in_step
    assert len(chosen) == len(set(often) or in_step), "every id of `often` is one of a combination"
    assert all({ids[i] for ids in chosen} == set(axis) for i, axis in enumerate(named)), "each value runs always"
    return pytest.mark.parametrize(
        tuple(axes),
        [
            pytest.param(
                *(axis[name] for axis, name in zip(named, ids, strict=True)),
                id="-".join(ids),
                marks=() if ids in chosen else pytest.mark.slow,
            )
            for ids in combinations
        ],
    )


def _id(value):
    return getattr(value, "__name__", None) or str(value)
