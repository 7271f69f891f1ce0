"""Run by test_distributed.py under torchrun: DDP and FSDP2 against one process, on CPUs (gloo).

Every process computes the reference itself: one process over the whole batch. Then each way of sharing the work trains
on its rows alone, and losses, weights and kept positions must agree.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from models import BY_NAME, VOCABULARY, Entry, keep_all, padded, schedules, tokens
from reference import relative_rms
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import simba_fx
from simba_fx.errors import SimbaError

ROWS, LENGTH, STEPS = 4, 40, 3


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(f"rank {dist.get_rank()}: {what}")


def batch(masked: bool) -> dict[str, Tensor]:
    if not masked:
        ids, mask = tokens(1, ROWS, LENGTH), {}
    else:
        rows = [tokens(b, length) for b, length in enumerate((40, 31, 37, 22))]
        ids, real = padded(rows, [LENGTH - len(row) for row in rows], [0] * ROWS)
        mask = {"attention_mask": real}
    return {"input_ids": ids, "labels": ids, **mask}


def part(call: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of this process."""
    share = ROWS // dist.get_world_size()
    return {name: held[dist.get_rank() * share :][:share] for name, held in call.items()}


def train(model: Any, call: dict[str, Tensor]) -> list[float]:
    model.train()
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**call).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def evaluate(model: Any, call: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(**call).logits
    return logits, simba_fx.kept(model)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mean(values: list[float]) -> Tensor:
    total = torch.tensor(values)
    dist.all_reduce(total)
    return total / dist.get_world_size()


# --- ways of sharing the work ----------------------------------------------------------------------------------------


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: nn.Module, **settings: Any) -> nn.Module:
    """Every block, and the model around them: the usual recipe."""
    for layer in model.base_model.layers:
        fully_shard(layer, **settings)
    fully_shard(model, **settings)
    expect(all(isinstance(p, DTensor) for p in model.parameters()), "not everything was sharded")
    return model


def sharded_at_once(model: nn.Module) -> nn.Module:
    fully_shard(model)
    return model


def sharded_and_recomputed(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    return sharded(model)


def sharded_and_compiled(model: nn.Module) -> nn.Module:
    model = sharded(model)
    model.compile(backend="aot_eager")
    return model


WAYS: tuple[Callable[[nn.Module], nn.Module], ...] = (
    ddp,
    sharded,
    sharded_at_once,
    sharded_and_recomputed,
    sharded_and_compiled,
)


# --- checks ----------------------------------------------------------------------------------------------------------


def check_training_equals_one_process(entry: Entry, ways: Any = WAYS) -> None:
    shares = schedules(len(entry.build().base_model.layers))["linear"]
    # padded rows have losses of their own weight, so that a mean over processes is another loss: compared unpadded
    call = batch(masked=False)
    alone = simba_fx.transform(entry.build(), shares)
    expected = train(alone, call)
    logits, kept = evaluate(alone, part(call))
    weights = alone.state_dict()
    for way in ways:
        model = way(simba_fx.transform(entry.build(), shares))
        losses = mean(train(model, part(call)))
        expect(relative_rms(losses, torch.tensor(expected)) < 1e-5, f"{entry.name}, {way.__name__}: {losses}")
        found, positions = evaluate(model, part(call))
        expect(relative_rms(found, logits) < 1e-5, f"{entry.name}, {way.__name__}: logits")
        expect(all(map(torch.equal, positions, kept)), f"{entry.name}, {way.__name__}: kept")
        for name, weight in model.state_dict().items():
            error = relative_rms(whole(weight), weights[name.removeprefix("module.")])
            expect(error < 1e-5, f"{entry.name}, {way.__name__}: {name} {error}")


def check_padded_rows_and_generation(entry: Entry) -> None:
    shares = schedules(len(entry.build().base_model.layers))["linear"]
    call = part(batch(masked=True))
    del call["labels"]
    alone, model = simba_fx.transform(entry.build(), shares), sharded(simba_fx.transform(entry.build(), shares))
    found, expected = evaluate(model, call), evaluate(alone, call)
    expect(relative_rms(found[0], expected[0]) < 1e-5, "logits of padded rows")
    expect(all(map(torch.equal, found[1], expected[1])), "kept of padded rows")
    new = {"max_new_tokens": 5, "do_sample": False}
    expect(torch.equal(model.generate(**call, **new), alone.generate(**call, **new)), "generated tokens")


def check_mixed_precision_is_the_dense_models(entry: Entry) -> None:
    """bfloat16 while computing, float32 shards: with everything kept, what the dense model does under FSDP."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    blocks = len(entry.build().base_model.layers)
    call = part(batch(masked=False))
    dense = sharded(entry.build(), mp_policy=policy)
    sparse = sharded(simba_fx.transform(entry.build(), keep_all(blocks), kernels="model"), mp_policy=policy)
    expected, found = train(dense, call), train(sparse, call)
    expect(relative_rms(torch.tensor(found), torch.tensor(expected)) < 2e-3, f"losses {found} and {expected}")
    logits, _ = evaluate(sparse, call)
    dense.eval()
    with torch.no_grad():
        theirs = dense(**call).logits
    expect(relative_rms(logits, theirs) < 3e-2, f"logits {relative_rms(logits, theirs)}")
    expect(all(p.grad is None or p.grad.dtype == torch.float32 for p in sparse.parameters()), "gradients")


def check_counts_depend_on_shapes_alone(entry: Entry) -> None:
    """Other tokens in every process, the same counts."""
    model = simba_fx.transform(entry.build(), "linear")
    evaluate(model, {"input_ids": tokens(dist.get_rank(), 2, LENGTH)})
    counts = torch.tensor([block.shape[1] for block in simba_fx.kept(model)])
    least, most = counts.clone(), counts.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    expect(torch.equal(least, most), f"{counts}")


def check_a_plain_module() -> None:
    import own_model

    def made() -> Any:
        torch.manual_seed(0)
        return simba_fx.transform(own_model.MyMamba(VOCABULARY, 16, 4, 4), "linear")

    def loss_of(model: Any, ids: Tensor) -> Tensor:
        return cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    ids = tokens(1, ROWS, LENGTH)
    mine = part({"ids": ids})["ids"]
    alone = made()
    loss_of(alone, ids).backward()
    expected = {name: p.grad for name, p in alone.named_parameters()}

    def by_block(model: Any) -> Any:
        for block in model.blocks.children():
            fully_shard(block)
        fully_shard(model)
        return model

    for way in (ddp, by_block, sharded_at_once):
        model = way(made())
        loss_of(model, mine).backward()
        for name, p in model.named_parameters():
            error = relative_rms(whole(p.grad), expected[name.removeprefix("module.")])
            expect(error < 1e-5, f"MyMamba, {way.__name__}: {name} {error}")


def check_what_is_refused(entry: Entry) -> None:
    call = {"input_ids": tokens(1, 2, LENGTH)}
    model = simba_fx.transform(entry.build(), "linear")
    fully_shard(model.base_model.layers[1].mixer)
    fully_shard(model)
    expect(
        message_of(lambda: evaluate(model, call))
        == (
            "layers.1.mixer.in_proj.weight is a DTensor while layers.1 runs: each process holds a part of it. Expected "
            "fully_shard on the blocks and on the model around them, after simba_fx.transform with compile='blocks'; "
            "shards of anything inside a block, and tensor parallel, cannot be run. Shard the blocks or the whole "
            "model."
        ),
        "shards inside a block",
    )
    model = sharded(simba_fx.transform(entry.build(), "linear", compile="whole"))
    expect(message_of(lambda: evaluate(model, call)).endswith("Shard the blocks or the whole model."), "one graph")
    expect(
        message_of(lambda: simba_fx.transform(sharded(entry.build()), "linear"))
        == (
            "transform expects a whole model; backbone.embeddings.weight is a DTensor, of which each process holds a "
            "part. Transform the model first, and apply fully_shard to the blocks and to the model around them "
            "afterwards."
        ),
        "sharded before",
    )
    expect(
        message_of(lambda: simba_fx.transform(ddp(entry.build()), "linear"))
        == (
            "transform expects a model of one process, found one wrapped in DistributedDataParallel. Transform the "
            "model inside it (model.module), and wrap the result in DistributedDataParallel."
        ),
        "wrapped before",
    )


def message_of(run: Callable[[], Any]) -> str:
    try:
        run()
    except SimbaError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def check_all(name: str) -> None:
    if name == "plain":
        check_a_plain_module()
        return
    entry = BY_NAME[name]
    check_training_equals_one_process(entry, WAYS if name == "mamba" else (sharded,))
    check_padded_rows_and_generation(entry)
    check_mixed_precision_is_the_dense_models(entry)
    check_counts_depend_on_shapes_alone(entry)
    if name == "mamba":
        check_what_is_refused(entry)


def main() -> None:
    torch.set_num_threads(1)
    torch._dynamo.config.cache_size_limit = 64
    dist.init_process_group("gloo")
    for name in sys.argv[1:]:
        check_all(name)
        dist.barrier()
        torch._dynamo.reset()
        print(f"checks of {name} passed", flush=True)
    dist.destroy_process_group()
    os._exit(0)  # threads of torch that still run then have once aborted a process whose checks had passed


if __name__ == "__main__":
    main()
