import pickle
from pathlib import Path

import numpy as np
import pytest

from vla.tokenizer import InstructionTokenizer, TokenizerError, train_tokenizer

SENTENCES = (
    "put the carrot on the plate",
    "stack the green block on the yellow block",
    "move the half-eaten apple left of the 2nd mug",
)


def test_every_training_word_is_one_token() -> None:
    tokenizer = train_tokenizer(SENTENCES, vocab_size=1024, length=16)
    for sentence in SENTENCES:
        ids = tokenizer.encode(sentence)
        words = sentence.split()
        assert ids.dtype == np.int64 and ids.shape == (16,)
        assert (ids[: 16 - len(words)] == 0).all() and (ids[16 - len(words) :] > 2).all()
        assert tokenizer.decode(ids) == sentence
    first, second = (tokenizer.encode(s).tolist() for s in ("block the plate", "the plate block"))
    assert first[-3:] == [second[-1], *second[-3:-1]], "a word has one id wherever it stands"
    assert max(tokenizer.tokenizer.get_vocab().values()) < tokenizer.vocab_size <= 1024


@pytest.mark.parametrize("sentence", ["put the crate on the plate.", "hebe die Möhre an 🥕", "PUT"])
def test_unseen_words_fall_into_pieces_and_come_back(sentence: str) -> None:
    tokenizer = train_tokenizer(SENTENCES, vocab_size=1024, length=40)
    ids = tokenizer.encode(sentence)
    assert (ids != 0).sum() > len(sentence.split())
    assert 2 not in ids and tokenizer.decode(ids) == sentence


def test_special_ids() -> None:
    vocabulary = train_tokenizer(SENTENCES, vocab_size=1024, length=8).tokenizer.get_vocab()
    assert [vocabulary[name] for name in ("<pad>", "<bos>", "<unk>")] == [0, 1, 2]


def test_same_sentences_give_the_same_ids_in_any_order() -> None:
    one = train_tokenizer(SENTENCES, 1024, 16)
    two = train_tokenizer([*reversed(SENTENCES), SENTENCES[0]], 1024, 16)
    assert one.tokenizer.get_vocab() == two.tokenizer.get_vocab()


def test_too_long_is_an_error_not_a_cut() -> None:
    tokenizer = train_tokenizer(SENTENCES, vocab_size=1024, length=6)
    assert (tokenizer.encode(SENTENCES[0]) != 0).all()
    with pytest.raises(TokenizerError) as error:
        tokenizer.encode(SENTENCES[0] + " carrot")
    assert error.value.codes == ("INSTRUCTION_TOO_LONG",)


def test_small_vocabulary_is_an_error_that_names_the_size_needed() -> None:
    with pytest.raises(TokenizerError) as error:
        train_tokenizer(SENTENCES, vocab_size=270, length=8)
    assert error.value.codes == ("VOCABULARY_TOO_SMALL",)
    needed = int(error.value.faults[0].expected.split()[-1])
    assert train_tokenizer(SENTENCES, needed, 8).vocab_size == needed
    with pytest.raises(TokenizerError):
        train_tokenizer(SENTENCES, needed - 1, 8)
    with pytest.raises(TokenizerError) as error:
        train_tokenizer([" "], 1024, 8)
    assert error.value.codes == ("NO_SENTENCES",)


def test_pickled_and_stored_copies_are_equal(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(SENTENCES, vocab_size=1024, length=24)
    tokenizer.save(tmp_path)
    for copy in (pickle.loads(pickle.dumps(tokenizer)), InstructionTokenizer.load(tmp_path)):
        assert copy.length == 24
        for sentence in (*SENTENCES, "an unseen thing, here!"):
            assert np.array_equal(copy.encode(sentence), tokenizer.encode(sentence))


def test_remembered_ids_cannot_be_changed() -> None:
    tokenizer = train_tokenizer(SENTENCES, vocab_size=1024, length=16)
    with pytest.raises(ValueError, match="read-only"):
        tokenizer.encode(SENTENCES[0])[0] = 5
