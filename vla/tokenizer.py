"""Instruction -> token ids of fixed length."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vla.errors import CodedError, Fault

SPECIAL_TOKENS = ("<pad>", "<bos>", "<unk>")  # ids 0, 1, 2
_CACHE_SIZE = 4096


class TokenizerError(CodedError):
    """The tokenizer can't be trained as asked, or a sentence does not fit it."""


class InstructionTokenizer:
    """A tokenizer of transformers with a fixed length L: the sentence, padded on the left.

    BOS is not among them: the model puts it before the image. Ids are remembered per sentence, so that
    encoding costs a dictionary look-up in the control loop.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, length: int) -> None:
        if length < 1:
            raise TokenizerError(Fault("TOKEN_LENGTH", "length", "1 or more", repr(length), "Raise the length."))
        self.tokenizer = tokenizer
        self.length = length
        self._ids: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer, "length": self.length, "_ids": {}}

    @property
    def pad_id(self) -> int:
        """Of the padding; 0 for the tokenizers trained here."""
        return int(self.tokenizer.pad_token_id)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def encode(self, sentence: str) -> np.ndarray:
        """int64 `[L]`, read-only. A sentence that is too long is an error: cut, it would be another task."""
        ids = self._ids.get(sentence)
        if ids is not None:
            return ids
        found = self.tokenizer.encode(sentence, add_special_tokens=False, verbose=False)
        if len(found) > self.length:
            expected = f"at most {self.length} tokens"
            remedy = "Shorten the instruction or train with a greater length."
            raise TokenizerError(
                Fault("INSTRUCTION_TOO_LONG", "instruction", expected, f"{len(found)} in {sentence!r}", remedy)
            )
        ids = np.full(self.length, self.pad_id, np.int64)
        ids[self.length - len(found) :] = found
        ids.flags.writeable = False
        if len(self._ids) >= _CACHE_SIZE:
            self._ids.clear()
        self._ids[sentence] = ids
        return ids

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json; L is `model_max_length` in the latter."""
        self.tokenizer.model_max_length = self.length
        self.tokenizer.save_pretrained(folder)

    @staticmethod
    def load(folder: Path) -> "InstructionTokenizer":
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        return InstructionTokenizer(tokenizer, tokenizer.model_max_length)

    def decode(self, ids: np.ndarray) -> str:
        return str(self.tokenizer.decode([int(i) for i in ids if i != self.pad_id], skip_special_tokens=True)).strip()


def train_tokenizer(sentences: Iterable[str], vocab_size: int, length: int) -> InstructionTokenizer:
    """Byte-level BPE in which every word of `sentences` is one token; others fall into pieces, down to bytes.

    vocab_size: upper bound on the ids (256 bytes, 3 special tokens and the merges). length: L.
    """
    corpus = sorted(set(sentences))
    if not any(sentence.strip() for sentence in corpus):
        remedy = "Pass the instructions of the task set."
        raise TokenizerError(Fault("NO_SENTENCES", "sentences", "at least one sentence", "none", remedy))
    tokenizer = _train(corpus, vocab_size)
    words = sorted({word for sentence in corpus for word in sentence.split()})
    split = [word for word in words if len(tokenizer.encode(word, add_special_tokens=False)) != 1]
    if split:
        needed = len(_train(corpus, 1 << 20).get_vocab())
        found, remedy = (
            f"{vocab_size}, too few for {split[:5]}",
            "Raise vocab_size (and the model's vocabulary).",
        )
        raise TokenizerError(Fault("VOCABULARY_TOO_SMALL", "vocab_size", f"at least {needed}", found, remedy))
    return InstructionTokenizer(tokenizer, length)


def _train(corpus: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    pad, bos, unk = SPECIAL_TOKENS
    backend = Tokenizer(models.BPE(unk_token=unk))
    # Split at white space only; each word starts with a space, so "plate" is one token wherever it stands.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=0,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, bos_token=bos, unk_token=unk, padding_side="left"
    )
