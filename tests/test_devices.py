"""No training step waits for its device more often than it reads the loss, shown without a GPU.

Everything is on the CPU, as "cpu:0", which it takes for another device than "cpu": what is moved
there is copied. These copies, the weights and all that is computed from them are what would be on
a GPU; a wait is whatever needs their values, or a number of them, on the host.
"""
import clip_model
import data
import lang_cls
import mkt
import pytest
import torch
import trm_ml
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
DEVICE = ["--device", "cpu:0", "--quiet", "--batch-size", "2"]


class Device(TorchDispatchMode):
    """Follows tensors through operations, forward and backward, and counts waits."""

    def __init__(self):
        super().__init__()
        self.waits = 0
        self.storages = {}  # the references keep the addresses from being used again

    def put(self, *trees):
        for x in tree_leaves(trees):
            if isinstance(x, torch.Tensor):
                storage = StorageWeakRef(x.untyped_storage())
                self.storages[storage.cdata] = storage

    def has(self, x):
        return isinstance(x, torch.Tensor) and x.untyped_storage()._cdata in self.storages

    def to_host(self, x):
        if self.has(x):
            self.waits += 1
            x = x.detach().clone()
            del self.storages[x.untyped_storage()._cdata]
        return x

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(map(self.has, tree_leaves((args, kwargs)))):
            to_host = func is aten.copy_.default and not self.has(args[0])
            mask = func in INDEXING and any(getattr(x, "dtype", 0) == torch.bool for x in args[1])
            self.waits += func in WAITS or to_host or mask
            if not to_host:
                self.put(result)
        elif kwargs.get("device") == torch.device("cpu:0"):
            self.put(result)
        return result


@pytest.fixture
def device(monkeypatch):
    device = Device()
    for name in ("cpu", "tolist", "numpy"):  # on the CPU these are no operations
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, method=method: method(device.to_host(x)))
    with device:
        yield device


@pytest.mark.parametrize("use, waits", [
    (lambda x: bool((x > 0).any()), 1), (lambda x: x.nonzero(), 1), (lambda x: x[x > 0], 1),
    (lambda x: x.tolist(), 1), (lambda x: torch.empty(6).copy_(x), 1),
    (lambda x: x.exp().sum().backward() or x.grad.max().item(), 1),
    (lambda x: torch.zeros(6, device="cpu:0").any().item(), 1),
    (lambda x: torch.ones(6).nonzero().to("cpu:0") + x.topk(2).values, 0)])
def test_the_counter_knows_what_waits(device, use, waits):
    use(torch.randn(6).to("cpu:0").requires_grad_())
    assert device.waits == waits


def images(clip, count):
    """Each of two images shows the first of three labels and does not show the second one."""
    size, targets = clip.visual.input_resolution, torch.tensor([[1, -1, 1], [1, -1, -1]])
    return data.MultiLabelDataset(["owl", "tree", "lamp"], targets.char().repeat(count // 2, 1),
                                  torch.rand(count, 3, size, size))


def train_mkt(stage, device, steps, output):
    args, _ = mkt.arguments([*DEVICE, "--epochs", "1", "--prompt-batch-size", "2", "--output",
                             output])
    clip = clip_model.load("toy-ViT")[0]
    device.put(clip.state_dict())
    model, dataset = mkt.MKT(clip, args.topk), images(clip, 2 * steps)
    device.put(model.state_dict())
    stages = mkt.make_stages(model, dataset, args)
    mkt.train(model, stages[stage - 1], dataset, None, {"method": "mkt", "log": []}, args)


def train_lang_cls(device, steps, output):
    args, _ = lang_cls.arguments([*DEVICE, "--epochs", "1", "--output", output])
    model, targets = lang_cls.CoMC(torch.randn(3, 8), torch.rand(3, 8)), torch.tensor([[1, -1, 1]])
    device.put(model.state_dict())
    lang_cls.train(model, torch.randn(2 * steps, 8), targets.repeat(2 * steps, 1), args)


def train_trm_ml(device, steps, output):
    args, _ = trm_ml.arguments([*DEVICE, "--epochs", "1", "--augment", "yes", "--output", output])
    clip = clip_model.load("toy-RN")[0]
    device.put(clip.state_dict())
    dataset = images(clip, 2 * steps)
    targets = dataset.full_targets
    run = trm_ml.make_run(0, clip, dataset.labels, targets, args)
    device.put(run.model.state_dict())
    dataset.full_targets = torch.stack([targets, targets], dim=1)  # what is known, the truth
    trm_ml.train([run], clip, dataset, None, {"method": "trm_ml"}, args)


@pytest.mark.parametrize("train", [
    lambda *given: train_mkt(1, *given), lambda *given: train_mkt(2, *given), train_lang_cls,
    train_trm_ml], ids=["mkt stage 1", "mkt stage 2", "lang_cls", "trm_ml"])
def test_more_steps_are_no_more_waits(device, train, tmp_path):
    """Epochs of 3 and of 6 steps read their losses equally often."""
    waits = []
    for steps in (3, 6):
        before = device.waits
        train(device, steps, str(tmp_path / str(steps)))
        waits.append(device.waits - before)
    assert waits[0] >= 1 and waits[0] == waits[1]
