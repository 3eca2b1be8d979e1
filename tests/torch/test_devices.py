"""The same laws on the CPU and on a GPU: attach there, move there, train, merge, save."""

import copy

import pytest
import torch
from torch import nn

from interop import RandLoraConfig
from randlora_torch import BufferDict, extract, get_peft_model, load_adapter
from tests.torch.conftest import TOKENS, load_llama

pytest.importorskip("bitsandbytes")

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])]
every_device = pytest.mark.parametrize("device", DEVICES)
every_kind = pytest.mark.parametrize("kind", ["plain", "int8", "nf4"])
TARGETS = ["q_proj", "v_proj", "down_proj"]


def config(**fields):
    given = {"r": 8, "randlora_alpha": 8, "target_modules": TARGETS, "init_weights": False}
    return RandLoraConfig(**{**given, **fields})


def logits(model, device):
    with torch.no_grad():
        return model(TOKENS.to(device)).logits.float().cpu()


@every_device
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_trains_saves_reloads_and_merges(llama_folder, tmp_path, kind, device, dtype):
    model = get_peft_model(
        load_llama(llama_folder, kind, dtype, compute=dtype, device=device), config(init_weights=True)
    )
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model.train()(TOKENS.to(device), labels=TOKENS.to(device)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert {p.device.type for p in model.parameters()} == {device}
    assert {basis.device.type for held in (model.randlora_A, model.randlora_B) for basis in held.values()} == {device}
    want = logits(model.eval(), device)
    model.save_pretrained(tmp_path)
    again = load_adapter(load_llama(llama_folder, kind, dtype, compute=dtype, device=device), tmp_path).eval()
    torch.testing.assert_close(logits(again, device), want, rtol=0, atol=0)
    rounding = model.merge_adapter()
    bound = {"plain": 1e-2 if dtype == torch.bfloat16 else 1e-6, "int8": 0.02, "nf4": 0.15}[kind]
    assert max(error.of_weight for error in rounding.values()) < bound
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, device), want, rtol=0, atol=0)


@every_device
def test_an_adapted_model_may_be_moved_and_its_bases_move_once(llama_folder, device):
    model = get_peft_model(load_llama(llama_folder), config()).eval()
    model.add_adapter("twin", config(target_modules=TARGETS))
    want = logits(model, "cpu")
    model.to(device)
    assert model.randlora_B["default"].device.type == device
    assert model.randlora_B["default"] is model.randlora_B["twin"]
    torch.testing.assert_close(logits(model, device), want, rtol=1e-4, atol=1e-4)
    assert extract(model, "default").to_interop().bases.B.dtype == "bfloat16"
    torch.testing.assert_close(logits(copy.deepcopy(model), device), logits(model, device), rtol=0, atol=0)
    model.cpu()
    torch.testing.assert_close(logits(model, "cpu"), want, rtol=0, atol=0)


@every_device
def test_layers_on_another_device_than_the_bases_get_one_copy_of_them_there(device):
    bases = BufferDict({"a": torch.ones(4, 1, 8)})
    bases["b"] = bases["a"]
    wanted = torch.device(device, 0) if device == "cuda" else torch.device("cpu")
    copies = [bases.on(name, wanted) for name in ("a", "b", "a")]
    assert copies[0] is copies[1] is copies[2]
    assert copies[0].device == wanted
    assert bases.nbytes == 4 * 8 * 4 * (2 if device == "cuda" else 1)


@pytest.mark.gpu
@no_gpu
def test_a_model_spread_over_devices_computes_as_on_one():
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config(target_modules="all-linear"))
    x = torch.randn(3, 8)
    want = model(x)
    model[1].cuda()  # its CPU twin is the test above
    hidden = model[0](x)
    torch.testing.assert_close(model[1](hidden.cuda()).cpu(), want, rtol=1e-4, atol=1e-4)
