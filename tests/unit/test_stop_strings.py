"""Stop strings found without decoding: the same token ends a row as when every beginning is decoded whole."""

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from inference.backends.row import RowMaker
from inference.detokenise import BROKEN, decoder_of, finish_text
from inference.in_flight import InFlight
from inference.loading import load_tokenizer
from inference.sampling import SamplingParams
from inference.sequence import Completion, Sequence
from inference.steps import Step
from inference.stop_strings import StopSlots, StopStrings
from inference.weights import check_small_files
from tests.benchmarks.bench_host import HostRunner, make_engine

MODELS = Path(__file__).parents[1] / "data" / "models"
FOX = "\N{FOX FACE}"
WORDS = ["a", "b", "ab", "END", "EN", "D", ".", "\n", "\n\n", " the", "er:", "User", "é", FOX]


def by_byte() -> Any:
    return load_tokenizer(check_small_files(MODELS / "tiny-a"))


def by_piece() -> Any:
    """A tokenizer like Llama 2's: a space is part of the next word, rare characters are single bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [word.replace(" ", "▁") for word in WORDS] + ["▁a", "▁END", "▁"]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {"by byte": by_byte(), "by piece": by_piece()}


def stopped_at(tokenizer: Any, token_ids: Seq[int], sampling: SamplingParams) -> int | None:
    """Return after how many tokens the text first holds a stop string that counts, by the plain rule."""
    decode = decoder_of(tokenizer)
    for end in range(sampling.min_tokens + 1, len(token_ids) + 1):
        if finish_text(decode, token_ids[:end], sampling.stop, sampling.min_tokens)[1]:
            return end
    return None


def found_at(tokenizer: Any, token_ids: Seq[int], sampling: SamplingParams) -> int | None:
    row = RowMaker(tokenizer, (), 1000)(Sequence(0, [1], sampling, draw_seed=0))
    assert row.stop_watch is not None
    for count, token_id in enumerate(token_ids, 1):
        if row.append(token_id, None):
            return count
    return None


def ids_of(tokenizer: Any, size: int) -> st.SearchStrategy[list[int]]:
    words = [tokenizer.encode(word, add_special_tokens=False) for word in WORDS]
    part = st.one_of(st.sampled_from(words), st.integers(0, size - 1).map(lambda i: [i]))
    return st.lists(part, max_size=30).map(lambda parts: [i for part in parts for i in part])


@settings(max_examples=150, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(TOKENIZERS)))
def test_the_same_token_ends_a_row_as_when_every_beginning_is_decoded_whole(data, name):
    tokenizer = TOKENIZERS[name]
    token_ids = data.draw(ids_of(tokenizer, tokenizer.backend_tokenizer.get_vocab_size()))
    text = decoder_of(tokenizer)(token_ids)
    begin = data.draw(st.integers(0, max(0, len(text) - 1)))
    cut = text[begin : begin + data.draw(st.integers(1, 9))].replace(BROKEN, "")
    sampling = SamplingParams(
        max_tokens=500,
        min_tokens=data.draw(st.sampled_from([0, 0, 2])),
        stop=tuple({cut or "END", data.draw(st.sampled_from(WORDS))}),
        ignore_eos=True,
    )
    expected = stopped_at(tokenizer, token_ids, sampling)
    assert found_at(tokenizer, token_ids, sampling) == expected


def test_few_tokens_of_a_vocabulary_can_end_a_stop_string():
    tokenizer = TOKENIZERS["by byte"]
    watch = StopStrings(tokenizer).watch_of(("User:",))
    assert watch is not None
    decode = decoder_of(tokenizer)
    texts = {decode([i]) for i in np.flatnonzero(watch.can_end).tolist()}
    assert all(":" in text or BROKEN in text for text in texts)
    assert any(":" in text for text in texts)


def test_tokens_a_vocabulary_has_not_and_places_without_one_end_nothing():
    watch = StopStrings(TOKENIZERS["by byte"]).watch_of((":",))
    slots = StopSlots(3)
    slots.set(1, watch)
    token = int(np.flatnonzero(watch.can_end)[0])
    found = slots.candidates(
        np.array([0, 1, 1, 1]), np.array([token, token, -1, 1 << 30], np.int32)
    )
    assert found == [1]


def test_a_tokenizer_whose_texts_do_not_simply_follow_each_other_is_read_token_by_token():
    tokenizer = Tokenizer(models.WordPiece({"a": 0, "##b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert StopStrings(fast).watch_of(("ab",)) is None
    row = RowMaker(fast, (), 100)(
        Sequence(0, [1], SamplingParams(max_tokens=9, stop=("ab",)), draw_seed=0)
    )
    assert [row.append(0, None), row.append(1, None)] == [False, True]


class SpokenRunner(HostRunner):
    """Every row says the same text, a token a step."""

    says: Seq[int] = ()

    def launch(self, step: Step) -> InFlight:
        flight = super().launch(step)
        for index, slot in enumerate(flight.slots):
            place = int(self._slots.num_sampled[slot]) - 1
            self._result[index] = self.says[place]
        return InFlight(step, flight.slots, self._result.clone(), flight.event, None)


def said(text: str, samplings: Seq[SamplingParams]) -> dict[int, Completion]:
    tokenizer = TOKENIZERS["by byte"]
    SpokenRunner.says = tokenizer.encode(text, add_special_tokens=False) + [40] * 200
    engine = make_engine(4, SpokenRunner)
    engine._make_row = RowMaker(tokenizer, (), 200)
    engine.submit(Sequence(i, [i, 2, 3], s, draw_seed=i) for i, s in enumerate(samplings))
    found: dict[int, Completion] = {}
    while engine.num_unfinished:
        found.update({completion.seq_id: completion for completion in engine.step()})
    return found


def test_rows_with_and_without_stop_strings_end_each_where_they_should():
    text = f"One two. {FOX} User: three\n\nfour"
    stops = [(), ("User:",), ("\n\n",), (FOX,), ("never",), ("two", "User:"), (". " + FOX,)]
    found = said(text, [SamplingParams(max_tokens=60, stop=stop) for stop in stops])
    for index, stop in enumerate(stops):
        cut = min((text.find(s) for s in stop if s in text), default=-1)
        assert found[index].finish_reason == ("length" if cut < 0 else "stop")
        if cut >= 0:
            assert found[index].text == text[:cut]
            ids = list(found[index].token_ids)
            assert ids == SpokenRunner.says[: len(ids)]
            sampling = SamplingParams(stop=stop)
            assert stopped_at(TOKENIZERS["by byte"], ids, sampling) == len(ids)


def test_a_stop_string_in_the_last_token_that_is_allowed_is_a_stop():
    text = "one two User:"
    count = len(TOKENIZERS["by byte"].encode(text, add_special_tokens=False))
    found = said(text, [SamplingParams(max_tokens=count, stop=("User:",))])
    assert (found[0].finish_reason, found[0].text) == ("stop", "one two ")


def test_rows_are_decoded_only_where_a_stop_string_may_end(monkeypatch):
    tokenizer = TOKENIZERS["by byte"]
    decoded: list[int] = []
    maker = RowMaker(tokenizer, (), 200)
    decode = maker._decode

    def counted(token_ids: Seq[int]) -> str:
        decoded.append(len(token_ids))
        return decode(token_ids)

    monkeypatch.setattr(maker, "_decode", counted)
    row = maker(Sequence(0, [1], SamplingParams(max_tokens=150, stop=("User:",)), draw_seed=0))
    for token_id in tokenizer.encode("plain words. " * 8, add_special_tokens=False):
        row.append(token_id, None)
    assert decoded == []
