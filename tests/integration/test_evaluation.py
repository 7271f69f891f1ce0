"""Evaluation code as people run it, unchanged: lm-eval, classification heads, Trainer.evaluate, strided perplexity.

All of it pads on the right and passes no mask: a causal model's results do not depend on what follows a token. Each row
of a batch has to come out as it does alone.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    BY_NAME,
    PER_KIND,
    VOCABULARY,
    Entry,
    _jamba,
    _zamba,
    _zamba2,
    dense,
    linear,
    names,
    randomise,
    sparse,
    tokens,
)
from reference import assert_close
from subprocesses import EXAMPLES, environment
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import (
    JambaConfig,
    JambaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    Zamba2ForSequenceClassification,
    ZambaForSequenceClassification,
)

import simba_fx
from simba_fx.evaluation.tasks import Haystacks

LM_EVAL = Path(sys.prefix) / "lm-eval"
"""Not on `sys.path`, where it is not needed (see the Makefile)."""
LENGTHS = (31, 17, 24, 9)
ROWS = [tokens(seed, length).clamp(min=3) for seed, length in enumerate(LENGTHS)]
"""Of ids that pad nothing and end nothing."""
PAD, END = 0, 1
ANSWER = 4
every_kind = pytest.mark.parametrize("entry", PER_KIND, ids=names(PER_KIND))


def right_padded(rows: list[Tensor], fill: int = PAD) -> Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def alone(model: nn.Module, row: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=row[None]).logits[0]
    return found


# --- lm-eval ---------------------------------------------------------------------------------------------------------


def words(ids: Tensor) -> str:
    return "".join(f" w{int(token)}" for token in ids)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A word for each id."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = {"<pad>": PAD, "<end>": END, "<unk>": 2} | {f"w{token}": token for token in range(3, VOCABULARY)}
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>", bos_token="<end>", unk_token="<unk>"
    )


@pytest.fixture
def harness(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`lm_eval`'s own wrapper around a model."""
    if not LM_EVAL.is_dir():
        pytest.skip(f"no folder {LM_EVAL}: make test adds it")
    monkeypatch.syspath_prepend(str(LM_EVAL))
    from lm_eval.models.huggingface import HFLM

    def wrap(model: nn.Module, batch_size: int | str) -> Any:
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_batch_size=4, max_length=48)

    return wrap


def requests(kind: str, *arguments: tuple[str, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


def likelihood(logits: Tensor, answer: Tensor) -> tuple[float, bool]:
    """Of an answer, from the last of the logits; and whether it is the greedy one."""
    logits = logits[-len(answer) :].log_softmax(-1)
    return float(logits.gather(1, answer[:, None]).sum()), bool((logits.argmax(-1) == answer).all())


def ambiguous(entry: Entry) -> nn.Module:
    """A model whose pads are its ends of sequence, as those of many tokenizers are."""
    model = entry.build()
    model.config.eos_token_id = model.config.pad_token_id = PAD
    return model


BATCHES = [1, 4, "auto"]


@pytest.mark.parametrize("batch_size", BATCHES)
@every_kind
def test_loglikelihood_of_the_harness(entry: Entry, batch_size: int | str, harness: Callable[..., Any]) -> None:
    """Prompts of different lengths, answers of the same number of tokens: each as the row alone."""
    pruned = sparse(entry.name, linear(entry))
    wrapped = harness(pruned, batch_size)
    asked = requests("loglikelihood", *((words(row[:-ANSWER]), words(row[-ANSWER:])) for row in ROWS))
    for around in (contextlib.nullcontext, lambda: simba_fx.answer(pruned, ANSWER - 1)):  # lm-eval leaves out its last
        with around():
            found = wrapped.loglikelihood(asked, disable_tqdm=True)
            expected = [likelihood(alone(pruned, row[:-1]), row[-ANSWER:]) for row in ROWS]
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("batch_size", BATCHES)
@every_kind
def test_rolling_loglikelihood_of_the_harness(entry: Entry, batch_size: int | str, harness: Callable[..., Any]) -> None:
    pruned = sparse(entry.name, linear(entry))
    found = harness(pruned, batch_size).loglikelihood_rolling(
        requests("loglikelihood_rolling", *((words(row),) for row in ROWS)), disable_tqdm=True
    )
    begun = [torch.cat((torch.tensor([END]), row)) for row in ROWS]
    assert found == pytest.approx([likelihood(alone(pruned, row[:-1]), row[1:])[0] for row in begun], abs=1e-4)


def test_where_pads_are_ends_of_sequence_the_caller_says_what_pads(harness: Callable[..., Any]) -> None:
    entry = BY_NAME["mamba"]
    pruned = simba_fx.transform(ambiguous(entry), linear(entry), pad_token_id=PAD)
    asked = requests("loglikelihood", *((words(row[:-ANSWER]), words(row[-ANSWER:])) for row in ROWS))
    found = [value for value, _ in harness(pruned, 4).loglikelihood(asked, disable_tqdm=True)]
    assert found == pytest.approx([likelihood(alone(pruned, row[:-1]), row[-ANSWER:])[0] for row in ROWS], abs=1e-4)


@pytest.fixture
def plugin(harness: Callable[..., Any], tokenizer: Any) -> Callable[..., Any]:
    """Our model for `lm_eval`."""
    from simba_fx.evaluation.harness import SimbaLM

    def wrap(model: nn.Module, batch_size: int | str, **options: str) -> Any:
        return SimbaLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_batch_size=4, max_length=48,
                       **options)  # fmt: skip

    return wrap


def scored_alone(model: nn.Module, row: Tensor, answer: int) -> tuple[float, bool]:
    """Of the last `answer` tokens of a row, which choose nothing of what is kept."""
    with simba_fx.tail(model, answer):
        return likelihood(alone(model, row[:-1]), row[-answer:])


@pytest.mark.parametrize("batch_size", BATCHES)
@pytest.mark.parametrize("pads", [True, False])
def test_our_model_for_the_harness_protects_each_continuation(
    batch_size: int | str, pads: bool, plugin: Callable[..., Any]
) -> None:
    """Continuations of different lengths, also of models whose pads end sequences; as each row alone."""
    model = BY_NAME["mamba"].build() if pads else ambiguous(BY_NAME["mamba"])
    wrapped = plugin(model, batch_size, schedule="Linear(0.2; every=2)", criterion="simba-l2+write/3")
    pruned = simba_fx.transform(
        BY_NAME["mamba"].build(), simba_fx.Linear(0.2, every=2), criterion="simba-l2+write", span=3
    )
    answers = (4, 1, 9, 2)
    asked = requests("loglikelihood", *((words(row[:-n]), words(row[-n:])) for row, n in zip(ROWS, answers)))
    found = wrapped.loglikelihood(asked, disable_tqdm=True)
    expected = [scored_alone(pruned, row, n) for row, n in zip(ROWS, answers)]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert 0.3 < wrapped.delivered < 0.95
    assert wrapped.get_model_info()["simba_fx_mean_share"] == wrapped.delivered


NEEDLES = """
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
target_delimiter: ""
"""
TASKS = {
    "generated": """
task: generated
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ['"'], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "chosen": """
task: chosen
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: 0
metric_list: [{metric: acc}]
""",
    "rolled": """
task: rolled
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}}"
metric_list: [{metric: byte_perplexity}]
""",
}
"""Of lm-eval's three kinds."""


@pytest.mark.skipif(not LM_EVAL.is_dir(), reason=f"no folder {LM_EVAL}: make test adds it")
def test_the_command_runs_local_tasks(tmp_path: Path) -> None:
    """`simba-fx lm-eval` with lm-eval's own evaluator: needles, which half of the tokens are enough for."""
    checkpoint = EXAMPLES / "mamba-needles-3m"
    texts = [torch.tensor(list(file.read_bytes())) for file in EXAMPLES.glob("*.py") if file.read_bytes().isascii()]
    haystacks = Haystacks(texts, lambda text: list(text.encode()), 1, "code", 0)
    rows = []
    for search in haystacks.searches("needles", 1024, [0.0, 0.25, 0.5], 4):
        text = bytes(search.ids[0].tolist()).decode()
        answer = text[-search.answer :]
        rows.append({"context": text[: -search.answer], "answer": answer, "choices": [answer, "0f1e2d"]})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(task + NEEDLES.replace("ROWS", str(tmp_path / "rows.jsonl")))
    command = [sys.executable, "-m", "simba_fx.cli", "lm-eval", "--model", "simba", "--device", "cpu",
               "--batch_size", "4", "--model_args", f"pretrained={checkpoint},schedule=0.5", "--tasks", ",".join(TASKS),
               "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out.json")]  # fmt: skip
    around = environment(LM_EVAL, HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    done = subprocess.run(command, env=around, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3_000:]
    (written,) = tmp_path.glob("out_*.json")
    found = json.loads(written.read_text())
    results = found["results"]
    assert results["generated"]["exact_match,none"] >= 0.75
    assert results["chosen"]["acc,none"] >= 0.9
    assert 1 < results["rolled"]["byte_perplexity,none"] < 6
    assert 0.5 < found["config"]["simba_fx_mean_share"] < 0.8
    assert "simba" in done.stdout


def test_our_model_for_the_harness_rolls_and_generates(plugin: Callable[..., Any]) -> None:
    wrapped = plugin(BY_NAME["mamba"].build(), 2, schedule="0.5")
    with pytest.warns(UserWarning, match="too short to prune: on average 100 % of the tokens entered a block"):
        rolled = wrapped.loglikelihood_rolling(
            requests("loglikelihood_rolling", *((words(row),) for row in ROWS)), disable_tqdm=True
        )
    begun = [torch.cat((torch.tensor([END]), row)) for row in ROWS]
    dense = [likelihood(alone(BY_NAME["mamba"].build(), row[:-1]), row[1:])[0] for row in begun]
    assert rolled == pytest.approx(dense, abs=1e-3)  # every token is scored, so that every token is kept
    told: Any = ({"until": ["<end>"], "max_gen_toks": 5, "do_sample": False},)
    (text,) = wrapped.generate_until(requests("generate_until", (words(ROWS[0]), *told)), disable_tqdm=True)
    pruned: Any = simba_fx.transform(BY_NAME["mamba"].build(), 0.5)
    new = pruned.generate(ROWS[0][None], max_new_tokens=5, do_sample=False)[0, len(ROWS[0]) :]
    assert (
        text.split() == [word for word in words(new).split() if word not in (f"w{PAD}", f"w{END}")][: len(text.split())]
    )
    assert text.split()


# --- padding that is found, and padding that is told -----------------------------------------------------------------


@every_kind
def test_a_right_padded_batch_without_a_mask(entry: Entry) -> None:
    """Found by the config's id; told by `lengths` where the pads are ordinary tokens; else they are read as text."""
    pruned = sparse(entry.name, linear(entry))
    with torch.no_grad():
        found = pruned(input_ids=right_padded(ROWS)).logits
        with simba_fx.lengths(pruned, torch.tensor(LENGTHS)):
            told = pruned(input_ids=right_padded(ROWS, fill=7)).logits
        text = pruned(input_ids=right_padded(ROWS, fill=7)).logits
    for b, row in enumerate(ROWS):
        expected = alone(pruned, row)
        assert_close(f"found, row {b}", found[b, : len(row)], expected, 2e-5)
        assert_close(f"told, row {b}", told[b, : len(row)], expected, 2e-5)
    assert (text[3, :9] - found[3, :9]).abs().max() > 0.1  # the test can fail


def jamba_head() -> nn.Module:
    return _classifier(JambaForSequenceClassification, _jamba().config)


def zamba_head() -> nn.Module:
    return _classifier(ZambaForSequenceClassification, _zamba().config)


def zamba2_head() -> nn.Module:
    return _classifier(Zamba2ForSequenceClassification, _zamba2().config)


def _classifier(head: type[nn.Module], config: Any) -> nn.Module:
    config.num_labels = 3
    model: Any = head(config)
    randomise(model, 5)
    if isinstance(config, JambaConfig):
        model.set_experts_implementation("grouped_mm")
    return model.eval()


@pytest.mark.parametrize("head", [jamba_head, zamba_head, zamba2_head])
def test_a_classification_head_reads_each_row_as_if_it_were_alone(head: Callable[[], Any]) -> None:
    model = head()
    pruned = simba_fx.transform(model, "linear")
    with torch.no_grad():
        single = torch.cat([pruned(input_ids=row[None]).logits for row in ROWS])
        batch = pruned(input_ids=right_padded(ROWS)).logits
        dense = torch.cat([model(input_ids=row[None]).logits for row in ROWS])
    assert single.shape == (4, 3)
    assert_close("rows of a batch", batch, single, 2e-5)
    assert (single - dense).abs().max() > 1e-3  # it is pruned


# --- Trainer.evaluate ------------------------------------------------------------------------------------------------


class Texts(Dataset[Any]):
    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> Tensor:
        return ROWS[index]


def collate(rows: list[Tensor]) -> dict[str, Tensor]:
    return {"input_ids": right_padded(rows), "labels": right_padded(rows, fill=-100)}


def test_trainers_evaluation_of_padded_batches_without_a_mask(tmp_path: Path) -> None:
    size, pruned = 2, simba_fx.transform(BY_NAME["mamba"].build(), linear(BY_NAME["mamba"]))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=size, report_to=[], use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, prediction_loss_only=True,
    )  # fmt: skip
    trainer = Trainer(model=pruned, args=arguments, eval_dataset=Texts(), data_collator=collate)
    found = trainer.evaluate()["eval_loss"]
    each = [cross_entropy(alone(pruned, row)[:-1], row[1:], reduction="sum") for row in ROWS]
    counts = [len(row) - 1 for row in ROWS]
    batches = [slice(start, start + size) for start in range(0, len(ROWS), size)]
    losses = [float(sum(each[batch])) / sum(counts[batch]) for batch in batches]
    assert found == pytest.approx(sum(losses) / len(losses), abs=1e-5)


# --- strided perplexity ----------------------------------------------------------------------------------------------


def windows(length: int, width: int, stride: int) -> list[tuple[int, int, int]]:
    """Begin, end and number of targets of each window, as transformers' documentation has them."""
    found, before = [], 0
    for begin in range(0, length, stride):
        end = min(begin + width, length)
        found.append((begin, end, end - before))
        before = end
        if end == length:
            break
    return found


def perplexity(model: nn.Module, ids: Tensor, width: int, stride: int, around: Callable[[int, int], Any]) -> float:
    """The recipe of transformers' "Perplexity of fixed-length models"; `around` each call of the model."""
    total, count = 0.0, 0
    for begin, end, targets in windows(ids.shape[1], width, stride):
        window = ids[:, begin:end]
        labels = window.clone()
        labels[:, :-targets] = -100
        with torch.no_grad(), around(end - begin, targets):
            loss = model(window, labels=labels).loss
        valid = int((labels != -100).sum()) - ids.shape[0]  # labels are shifted inside
        total, count = total + float(loss) * valid, count + valid
    return total / count


@every_kind
def test_strided_perplexity_takes_each_windows_tail_from_its_labels(entry: Entry) -> None:
    """Without it every window's last token chooses what is kept of the targets before it."""
    model, ids = dense(entry.name), tokens(9, 1, 150)
    labelled, plain = sparse(entry.name, linear(entry), tail="labels"), sparse(entry.name, linear(entry))

    def explicit(width: int, targets: int) -> Any:
        return simba_fx.tail(plain, min(width, targets + 1))

    def nothing(*_: int) -> Any:
        return contextlib.nullcontext()

    found = perplexity(labelled, ids, 60, 15, nothing)
    assert found == perplexity(plain, ids, 60, 15, explicit)
    assert found != perplexity(plain, ids, 60, 15, nothing)
    assert found != perplexity(model, ids, 60, 15, nothing)
