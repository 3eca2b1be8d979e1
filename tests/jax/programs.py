"""What stands in a traced program."""


def equations(jaxpr, *, skip=""):
    """All equations of a jaxpr, also those in calls, without the bodies of one primitive."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name != skip:
            for value in equation.params.values():
                if hasattr(getattr(value, "jaxpr", value), "eqns"):
                    yield from equations(value, skip=skip)
