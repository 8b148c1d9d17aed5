"""`from qnext import LLM`: what it gives is what engine, chat and logits give."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qnext import LLM, SamplingParams
from qnext.checkpoint import load_model
from qnext.errors import DoesNotFit, ModelNotFound, UsageError
from qnext.model import Batch
from qnext.session.conversation import open_conversation
from qnext.session.results import ChatAnswer, GeneratedText, TextPiece, TextScore
from qnext.text.thinking import THINK_END
from tests.server.serving import save_served

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True, seed=1)
HYBRID = Path(__file__).parents[1] / "text/templates/Qwen-Qwen3-0.6B.jinja"
TEXTS = ["Hello", "def main(", "The delta rule"]


@pytest.fixture(scope="module")
def llm(chat_folder: Path) -> Iterator[LLM]:
    with LLM(chat_folder, max_num_seqs=2, max_model_len=128) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain(plain_folder: Path) -> Iterator[LLM]:
    with LLM(str(plain_folder), dtype="float32") as opened:
        yield opened


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, qnext; assert 'LLM' not in vars(qnext); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_name_is_an_attribute_error() -> None:
    import qnext

    with pytest.raises(AttributeError, match="'LLN'"):
        qnext.LLN  # noqa: B018


def test_one_and_many_are_what_the_engine_gives(llm: LLM) -> None:
    expected = llm.engine.generate([llm.tokenize(text) for text in TEXTS], GREEDY)
    many = llm.generate(TEXTS, GREEDY)
    assert [found.token_ids for found in many] == [completion.output_ids for completion in expected]
    assert many[0].text == llm.tokenizer.decode(expected[0].output_ids, skip_special=True)
    one = llm.generate(TEXTS[1], GREEDY)
    assert isinstance(one, GeneratedText) and one.text == many[1].text
    assert llm.generate(llm.tokenize(TEXTS[1]), GREEDY).token_ids == one.token_ids
    assert (one.finish_reason, one.num_prompt_tokens) == ("length", len(llm.tokenize(TEXTS[1])))
    assert llm.generate([]) == []
    with pytest.raises(AttributeError):
        one.text = ""  # type: ignore[misc]


def test_each_prompt_may_have_its_parameters(llm: LLM) -> None:
    short, warm = SamplingParams(max_tokens=2, ignore_eos=True), SamplingParams(max_tokens=9, temperature=2.0, seed=5)
    found = llm.generate(TEXTS[:2], [short, warm])
    assert len(found[0].tokens) == 2 and found[1].seed == 5
    assert llm.generate(TEXTS[1], warm).text == found[1].text
    with pytest.raises(UsageError, match="2 prompts but 1 sampling"):
        llm.generate(TEXTS[:2], [short])


def test_without_parameters_the_folder_decides(llm: LLM, plain: LLM) -> None:
    assert (llm.default_params.temperature, llm.default_params.top_k) == (1.4, 50)
    assert plain.default_params == SamplingParams(max_tokens=256)
    assert plain.generate("a" * 250).num_prompt_tokens == 250


def test_a_stop_string_ends_the_text(llm: LLM) -> None:
    whole = llm.generate(TEXTS, GREEDY)
    stop = whole[0].text[3:5]
    found = llm.generate(TEXTS, GREEDY, stop=[stop])
    assert found[0].text == whole[0].text[: whole[0].text.index(stop)] and found[0].finish_reason == "stop"
    for cut, full in zip(found, whole, strict=True):
        assert cut.text == full.text.partition(stop)[0]
    assert not llm.engine.has_unfinished


def test_a_stream_is_the_same_text_in_pieces(llm: LLM) -> None:
    pieces = list(llm.stream(TEXTS[0], GREEDY))
    assert len(pieces) > 3 and "".join(piece.text for piece in pieces) == llm.generate(TEXTS[0], GREEDY).text
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert all(isinstance(piece, TextPiece) for piece in pieces)


def test_leaving_a_stream_ends_its_request(llm: LLM) -> None:
    stream = llm.stream("Hi", GREEDY)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    llm.stream("Hi", GREEDY)  # never begun
    assert not llm.engine.has_unfinished


def test_a_chat_is_the_conversation_of_the_command_line(llm: LLM, chat_folder: Path) -> None:
    talk = open_conversation(load_model(chat_folder), llm.tokenizer, GREEDY, chat_format=llm.chat_format)
    first = llm.chat("Hi", GREEDY)
    assert isinstance(first, ChatAnswer) and first.reasoning is None
    assert first.content == talk.answer("Hi", lambda text: None)
    messages = [{"role": "user", "content": "Hi"}, first.message, {"role": "user", "content": "And?"}]
    assert llm.chat(messages, GREEDY).content == talk.answer("And?", lambda text: None)
    streamed = list(llm.stream(messages, GREEDY))
    assert "".join(piece.text for piece in streamed) == llm.chat(messages, GREEDY).content


def test_a_thought_is_apart(tmp_path: Path) -> None:
    with LLM(save_served(tmp_path / "thinking", thinks=True)) as llm:
        thought = llm.chat("Hi", GREEDY)
        assert thought.reasoning == thought.generated.text.strip("\n") and thought.content == ""
        pieces = list(llm.stream([{"role": "user", "content": "Hi"}], GREEDY))
        assert all(piece.is_reasoning for piece in pieces if piece.text)
        answer = llm.chat("Hi", GREEDY, thinks=False)
        assert answer.reasoning is None and answer.content and THINK_END not in answer.content


def test_a_foreign_template_takes_arguments_and_ends_with_the_model(chat_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(chat_folder, tmp_path / "m"))
    shutil.copyfile(HYBRID, folder / "chat_template.jinja")
    with LLM(folder) as llm:
        arguments = {"enable_thinking": False}
        asked = llm.chat("Hi", GREEDY, template_arguments=arguments)
        assert asked == llm.chat("Hi", GREEDY, thinks=False)
        assert asked.generated.num_prompt_tokens > llm.chat("Hi", GREEDY).generated.num_prompt_tokens
        pieces = llm.stream([{"role": "user", "content": "Hi"}], GREEDY, template_arguments=arguments)
        assert "".join(piece.text for piece in pieces) == asked.content
        with pytest.raises(UsageError, match="reads no argument 'nope'"):
            llm.chat("Hi", template_arguments={"nope": 1})
        template = llm.chat_format.template
    assert template is not None and template._worker is None


def test_scores_are_those_of_the_logits(plain: LLM, plain_folder: Path) -> None:
    score = plain.score("The delta rule forgets.")
    assert isinstance(score, TextScore) and score.logprobs[0] is None
    ids = torch.tensor(score.token_ids)
    model = load_model(plain_folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model.logits(model(Batch.from_lengths(ids, [len(ids)])).hidden_TD).float()
    expected = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    # One pass over the same rows in fp32; the engine's pages change the order of some sums.
    assert torch.tensor(score.logprobs[1:]) == pytest.approx(expected, abs=1e-4)
    assert score.total == pytest.approx(float(expected.sum()), abs=1e-3)
    assert plain.score(plain.tokenize("The delta rule forgets.")) == score


def test_refusals(llm: LLM, plain: LLM, plain_folder: Path) -> None:
    with pytest.raises(ModelNotFound):
        LLM("nowhere")
    with pytest.raises(TypeError, match="max_num_sequences"):
        LLM(plain_folder, max_num_sequences=3)
    with pytest.raises(UsageError, match="dtype"):
        LLM(plain_folder, dtype="float8")
    with pytest.raises(UsageError, match="no chat template"):
        plain.chat("Hi")
    with pytest.raises(DoesNotFit):
        llm.generate(["a", "b" * 500])
    with pytest.raises(UsageError, match="several requests"):
        llm.generate("a", SamplingParams(n=2))
    assert not llm.engine.has_unfinished
