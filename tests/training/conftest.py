"""Tiny random models: a generator whose embeddings are tied, as SmolLM2's are, and an encoder."""

import os
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ragkit.models import BiEncoder

TEXT = (
    "Tin melts at 232 degrees. Lead is heavy. Question: Who? Answer: According to the previous "
    "relevant passages, please answer the following question. Only return the answer."
)
WORDS = TEXT + " tin lead zinc iron gold copper nickel silver cobalt barium when does melt"
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture
def tiny():
    return tiny_model()


def tiny_model(vocabulary=97):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
KINDS = {
    "Mistral": {"sliding_window": 4},
    "Gemma2": {**WINDOWS, "head_dim": 8},
    "Gemma3Text": {**WINDOWS, "head_dim": 8},
    "Qwen3": {"head_dim": 8},
    "Phi3": {"pad_token_id": 0},
    "Mixtral": {"num_local_experts": 4},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "GPT2": {"n_embd": 32, "n_head": 4, "n_layer": 2},
    "Bloom": {"n_head": 4, "n_layer": 2},
}  # fmt: skip
KNOWN = {
    "GPT2": ["vocab_size"],
    "Falcon": ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"],
    "Bloom": ["vocab_size", "hidden_size", "num_hidden_layers"],
    "Mamba": ["vocab_size", "hidden_size", "num_hidden_layers"],
}


@pytest.fixture
def of_kind():
    """Makes a tiny random model of a kind, by transformers' name of it."""

    def made(name, attention=None, **given):
        torch.manual_seed(0)
        known = {key: SMALL[key] for key in KNOWN.get(name, SMALL)}
        config = getattr(transformers, f"{name}Config")(**known, **KINDS.get(name, {}), **given)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()

    return made


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A folder that `Generator.load` reads: byte-level BPE, a chat template, random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    tiny_model(len(fast)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder_folder(tmp_path_factory):
    """A folder that `BiEncoder.load` reads: words and letters, random weights."""
    folder = tmp_path_factory.mktemp("encoder")
    words = sorted({word.strip(".,:?").lower() for word in WORDS.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    vocabulary += [f"##{letter}" for letter in string.ascii_lowercase + string.digits]
    vocabulary += [c for c in string.ascii_lowercase + string.digits + ".,:?" if c not in words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    model = SentenceTransformer(
        modules=[
            (read := Transformer(str(folder))),
            Pooling(read.get_embedding_dimension()),
            Normalize(),
        ],
        device="cpu",
        similarity_fn_name="cosine",
    )
    model.max_seq_length = 48
    whole = tmp_path_factory.mktemp("sentence-encoder")
    model.save_pretrained(str(whole), create_model_card=False)
    return whole


@pytest.fixture
def tiny_encoder(tiny_encoder_folder):
    """A bi-encoder of random weights, in fp32."""
    return BiEncoder.load(str(tiny_encoder_folder), device="cpu", precision="fp32")


@pytest.fixture
def on_two_processes(request, tmp_path):
    """Runs lines, which see the test file's names, on two processes: what each put into `found`."""

    def run(body):
        script, out = tmp_path / "script.py", tmp_path / "found"
        script.write_text(
            "import sys, torch\n"
            "from pathlib import Path\n"
            "from safetensors.torch import save_file\n"
            f"sys.path[:0] = [{str(request.path.parent)!r}]\n"
            f"from {request.path.stem} import *\n"
            f"{body}\n"
            "torch.distributed.barrier()\n"
            "path = f'{sys.argv[1]}-{torch.distributed.get_rank()}'\n"
            "save_file({n: t.contiguous() for n, t in found.items()}, path)\n"
        )
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        subprocess.run(
            [*torchrun, "--nproc-per-node=2", str(script), str(out)],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
            timeout=300,
        )
        return [load_file(f"{out}-{rank}") for rank in (0, 1)]

    return run
