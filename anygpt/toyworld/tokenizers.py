"""The three tokenizers of the tiny zoo, trained on ToyWorld's own sentences.

All are byte-level BPE: every byte is a token, so any text can be encoded.
"""

from __future__ import annotations

import json

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, RobertaTokenizer

from anygpt.toyworld import language

END = "<|end|>"

# `{% generation %}` marks the assistant's text, including its end-of-turn token, so that
# `apply_chat_template(..., return_assistant_tokens_mask=True)` returns the tokens to be learnt. Media must be
# turned into placeholder text first; the template raises on them rather than drop them silently.
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
    """The language model's tokenizer with its chat template. As in GPT-2 and Qwen, no BOS is added to plain text."""
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
    words = CLIPTokenizer().backend_tokenizer.pre_tokenizer  # CLIP's own word splitting
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
    """Train byte-level BPE on ToyWorld's sentences, deterministically.

    Args:
        words: splits text into words, which merges do not cross.
        special: tokens with the first ids, in this order.
        vocab_size: upper limit.
        suffix: end-of-word suffix; if given, every byte with the suffix is a token too.
        lower: train on lower-case text.

    Returns:
        The vocabulary (token -> id) and the merges.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if suffix:
        alphabet += [byte + suffix for byte in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        # Adding the alphabet to the special tokens fixes its ids: the trainer itself numbers suffixed letters in the
        # order of a randomly seeded hash map, and omits those that do not occur in the corpus.
        special_tokens=special + alphabet,
        end_of_word_suffix=suffix,
        show_progress=False,
    )
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=suffix))
    tokenizer.pre_tokenizer = words
    corpus = language.sentences(np.random.default_rng(0))
    tokenizer.train_from_iterator((text.lower() if lower else text for text in corpus), trainer)
    # Only the model is kept, since the trainer registered the alphabet as added tokens.
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]
