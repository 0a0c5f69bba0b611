"""The three tokenizers of the tiny zoo, trained on ToyWorld's own sentences.

All are byte-level BPE: every byte is a token, so any text can be encoded and nothing is ever unknown.
"""

from __future__ import annotations

import json

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, RobertaTokenizer

from anygpt.toyworld import language

END = "<|end|>"

# `{% generation %}` marks what the assistant says (its end-of-turn token included), so that
# `apply_chat_template(..., return_assistant_tokens_mask=True)` tells which tokens are to be learnt. Media have
# to be turned into placeholder text first: this language model reads text, and dropping a part would be silent.
CHAT_TEMPLATE = (
    "{%- macro text_of(content) -%}"
    "{%- if content is string -%}{{- content -}}"
    "{%- else -%}{%- for part in content -%}"
    "{%- if part['type'] != 'text' -%}"
    "{{- raise_exception('The chat template of this language model takes text parts only, not ' ~ part['type']"
    " ~ ': turn media into placeholder text first.') -}}"
    "{%- endif -%}{{- part['text'] -}}{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('Unknown role ' ~ message['role'] ~ ': expected system, user or assistant.') -}}"
    "{%- endif -%}"
    "{{- '<|' ~ message['role'] ~ '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- text_of(message['content']) ~ eos_token -}}{%- endgeneration -%}"
    "{%- else -%}{{- text_of(message['content']) ~ eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def llm_tokenizer(vocab_size: int = 1000) -> PreTrainedTokenizerFast:
    """The language model's tokenizer, with its chat template. As in GPT-2 and Qwen, no BOS is added to plain text."""
    special = ["<|pad|>", "<|bos|>", END, "<|unk|>", "<|system|>", "<|user|>", "<|assistant|>"]
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocab, merges = _train_bpe(bytes_only, special, vocab_size)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = bytes_only
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        bos_token=special[1],
        eos_token=END,
        unk_token=special[3],
        additional_special_tokens=special[4:],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def clip_tokenizer(model_max_length: int, vocab_size: int = 800) -> CLIPTokenizer:
    """CLIP's tokenizer: lower case, `</w>` at the end of words, padded with the end-of-text token."""
    words = CLIPTokenizer().backend_tokenizer.pre_tokenizer  # an empty one's, so that the words are CLIP's own
    vocab, merges = _train_bpe(words, ["<|startoftext|>", "<|endoftext|>"], vocab_size, suffix="</w>", lower=True)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=model_max_length)


def roberta_tokenizer(model_max_length: int, vocab_size: int = 700) -> RobertaTokenizer:
    """RoBERTa's tokenizer, as CLAP uses it, with RoBERTa's ids for the special tokens."""
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocab, merges = _train_bpe(bytes_only, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], vocab_size)
    return RobertaTokenizer(vocab=vocab, merges=merges, model_max_length=model_max_length)


def _train_bpe(
    words: pre_tokenizers.PreTokenizer, special: list[str], vocab_size: int, suffix: str = "", lower: bool = False
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Train byte-level BPE on ToyWorld's sentences; the same vocabulary every time.

    Args:
        words: splits text into words, which merges do not cross.
        special: tokens with the first ids, in this order.
        vocab_size: at most so many tokens.
        suffix: end-of-word suffix; every byte is then also a token with it.
        lower: train on lower-case text.

    Returns:
        The vocabulary (token -> id) and the merges.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if suffix:
        alphabet += [byte + suffix for byte in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        # The alphabet goes in with the special tokens, which fixes its ids: the trainer itself numbers suffixed
        # letters in the order of a randomly seeded hash map, and leaves out those that the corpus does not have.
        special_tokens=special + alphabet,
        end_of_word_suffix=suffix,
        show_progress=False,
    )
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=suffix))
    tokenizer.pre_tokenizer = words
    corpus = language.sentences(np.random.default_rng(0))
    tokenizer.train_from_iterator((text.lower() if lower else text for text in corpus), trainer)
    # Only the model is taken: the trainer made added tokens of all special ones, the alphabet among them.
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]
