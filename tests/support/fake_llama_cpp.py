"""What the bench's worker needs of ``llama_cpp``, without llama.cpp: counts tokens, and can crash like a broken kernel.

Installed as a module of that name beside an interpreter that the bench is told to use.
"""

import os
import signal
import sys
from types import SimpleNamespace

__version__ = "0.0-fake"
VOCABULARY = 100


def llama_model_default_params():
    return SimpleNamespace(use_extra_bufts=True)


def llama_model_load_from_file(path, params):
    os.write(1, b"what C code prints is no answer\n")
    with open(path, "rb") as file:  # noqa: PTH123 a stand-in for C
        content = file.read()
    if content == b"damaged":
        return None
    return SimpleNamespace(crashes=content == b"crashes" and params.use_extra_bufts)


def llama_context_default_params():
    return SimpleNamespace()


def llama_init_from_model(model, params):
    return SimpleNamespace(model=model, params=params, lengths={})


def llama_model_get_vocab(model):
    return model


def llama_vocab_n_tokens(vocab):
    return VOCABULARY


def llama_print_system_info():
    return b"FAKE = 1"


def llama_get_memory(context):
    return context


def llama_memory_clear(memory, data):
    memory.lengths.clear()


def llama_batch_init(num_tokens, embd, num_sequences):
    lists = {name: [0] * num_tokens for name in ("token", "pos", "n_seq_id", "logits")}
    return SimpleNamespace(seq_id=[[0] for _ in range(num_tokens)], **lists)


def llama_decode(context, batch):
    """Every token must follow the ones before it in its sequence, and fit."""
    if context.model.crashes and batch.n_tokens > 1:
        print("ggml: about to crash", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    for i in range(batch.n_tokens):
        sequence = batch.seq_id[i][0]
        length = context.lengths.get(sequence, 0)
        limit = context.params.n_ctx // context.params.n_seq_max
        if batch.pos[i] != length or length >= limit or not 0 <= batch.token[i] < VOCABULARY:
            return 1
        context.lengths[sequence] = length + 1
    return 0 if sequence < context.params.n_seq_max and batch.logits[batch.n_tokens - 1] else 1


def llama_synchronize(context):
    pass


def llama_batch_free(batch):
    pass
