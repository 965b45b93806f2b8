"""`ragkit export`: a model with its virtual tokens, for servers that know nothing of ragkit."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, validators

from .console import print_json, say

if TYPE_CHECKING:
    from .models.export import Exported
    from .models.virtual_tokens import VirtualTokens
    from .prompts import Prompt

FORMAT = 1
MANIFEST = "virtual_tokens.json"
QUESTION = "Which metal melts in the hand?"
PASSAGES = (
    ("Gallium", "Gallium is a soft, silvery metal. It melts at 29.76 degrees."),
    ("", "Tin melts at 232 degrees, and was known in antiquity."),
)


def export(
    *,
    base: str,
    virtual_tokens: Path,
    output: Path,
    use_tokens: Annotated[int | None, Parameter(validator=validators.Number(gte=1))] = None,
    replace: bool = False,
    json: bool = False,
) -> None:
    """Write a model with its virtual tokens as a folder that vLLM, TGI or llama.cpp can serve.

    The tokens become words of the tokenizer, and rows of the embeddings; the README.md in the
    folder shows the prompt that holds them.

    Example: ragkit export --base models/base --virtual-tokens tokens --output served

    Parameters
    ----------
    base
        The generator that the tokens were learnt on; a LoRA folder is merged.
    virtual_tokens
        A folder of virtual tokens.
    output
        The folder to write: transformers' own files, a README.md and virtual_tokens.json.
    use_tokens
        Export only the first so many tokens; all if not given.
    replace
        Replace a folder that was exported before.
    json
        Print what was written as JSON.
    """
    from .artefacts import check_output, new_folder, write_json, write_text
    from .models.export import export_model
    from .models.virtual_tokens import VirtualTokens

    check_output(output, replace, MANIFEST)
    tokens = VirtualTokens.load(virtual_tokens)
    trained = len(tokens)
    tokens = tokens if use_tokens is None else tokens.first(use_tokens)
    with new_folder(output, replace=replace, mark=MANIFEST) as folder:
        exported = export_model(base, tokens, _example(tokens), folder)
        manifest = _manifest(base, tokens, trained, exported)
        write_json(folder / MANIFEST, manifest)
        write_text(folder / "README.md", _readme(output.name, tokens, manifest))
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner reads
    if json:
        print_json(manifest | {"output": str(output)})
        return
    print(
        f"{output}: {base} with {len(tokens)} virtual tokens, {exported.dtype}; the prompt is in "
        "README.md"
    )
    if not exported.same_ids:
        say(
            "This tokenizer joins characters across the parts of a prompt: as text, the prompt is "
            "not exactly what the tokens were learnt with. README.md tells how to send ids."
        )


def _example(tokens: VirtualTokens) -> Prompt:
    """Return a prompt of two passages in the tokens' wording."""
    from .prompts import build_prompt
    from .splitting import sentences
    from .types import Document, Hit

    hits = [Hit(Document(title or "-", text, title), 1.0) for title, text in PASSAGES]
    style = tokens.style
    return build_prompt(
        style, QUESTION, hits, budget=2000, window=4000, count=len, sentences=sentences
    )


def _manifest(base: str, tokens: VirtualTokens, trained: int, exported: Exported) -> dict[str, Any]:
    from . import __version__
    from .models.prompt_ids import PLAIN_STOPS
    from .models.spellings import PLACEHOLDER

    return {
        "format": FORMAT,
        "kind": "exported virtual tokens",
        "ragkit": __version__,
        "base": base,
        "base_hash": tokens.base_hash,
        "dtype": exported.dtype,
        "count": len(tokens),
        "trained": trained,
        "tokens": exported.string,
        "first_id": exported.first_id,
        "layout": tokens.layout,
        "placement": tokens.placement,
        "style": tokens.style.to_json(),
        "placeholder": None if exported.messages is None else PLACEHOLDER,
        "stop": list(PLAIN_STOPS) if tokens.layout == "plain" else [],
        "highest_probability_in_example": exported.probability,
        "example": {
            "question": QUESTION,
            "passages": [{"title": title, "text": text} for title, text in PASSAGES],
            "messages": exported.messages,
            "text": exported.text,
            "add_special_tokens": exported.add_special_tokens,
            "ids": list(exported.ids),
            "text_gives_these_ids": exported.same_ids,
        },
    }


def _readme(name: str, tokens: VirtualTokens, manifest: dict[str, Any]) -> str:
    from .artefacts import to_json

    example, style = manifest["example"], manifest["style"]
    base = str(manifest["base"])
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    special = str(example["add_special_tokens"])
    return Template(_README).substitute(
        name=name,
        base=base,
        card=f"base_model: {base}\n" if on_hub else "",
        count=len(tokens),
        ids=f"{manifest['first_id']} to {manifest['first_id'] + len(tokens) - 1}",
        layout=tokens.layout,
        wordings="\n".join(
            f"- {field.replace('_', ' ')}: `{to_json(value)}`"
            for field, value in style.items()
            if value and field != "name"
        ),
        text=example["text"],
        special=special,
        special_json=special.lower(),
        stops=_STOPS.format(", ".join(f"`{to_json(stop)}`" for stop in manifest["stop"]))
        if manifest["stop"]
        else "An answer ends with the chat's own end token; no stop strings are needed.",
        same=_SAME if example["text_gives_these_ids"] else _OTHER,
        chat=_CHAT.format(to_json({"messages": example["messages"]}, indent=1))
        if example["messages"]
        else _NO_CHAT,
        probability=f"{manifest['highest_probability_in_example']:.1e}",
    )


_SAME = "Tokenised so, the example gives exactly the ids that the tokens were learnt with."
_OTHER = (
    "**This tokenizer joins characters across the parts of a prompt**: as text, the example gives "
    "other ids than those that the tokens were learnt with. Send ids where that matters (below)."
)
_CHAT = """The chat template of this folder replaces `<|virtual_tokens|>` by all the tokens, so that
clients of the chat interface (OpenAI's, as vLLM, TGI and llama-server speak it) need not spell
them. A message without it is answered by the base model.

```json
{}
```"""
_STOPS = (
    "Give any of them the stop strings {}: in the plain layout no control token ends an answer."
)
_NO_CHAT = "The chat interface has no short form of them here: send the whole text, or ids."

_README = """---
library_name: transformers
pipeline_tag: text-generation
${card}tags:
- retrieval-augmented generation
- virtual tokens
---
# $name

`$base` with $count virtual tokens for retrieval-augmented generation (Zhu et al. 2025,
arXiv 2405.19670) in its vocabulary: `<|virtual_1|>` to `<|virtual_$count|>`, ids $ids.
In a prompt without them it is the base model. The base model's licence holds. Written by
`ragkit export`.

## The prompt

All $count tokens stand in their order between the passages and the question, or wherever the
example shows them. They were learnt in the $layout layout, with this wording; other words cost
quality:

$wordings

The example of `virtual_tokens.json`, whole (to be tokenised with `add_special_tokens=$special`):

```text
$text
```

$same

$chat

## Serving

transformers:

```python
import json
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("$name")
model = AutoModelForCausalLM.from_pretrained("$name", dtype="auto")
example = json.load(open("$name/virtual_tokens.json"))["example"]
inputs = tokenizer(example["text"], add_special_tokens=$special, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

vLLM: `vllm serve $name`, then POST to `/v1/completions`
`{"model": "$name", "prompt": TEXT, "add_special_tokens": $special_json, "temperature": 0}`.
TGI: `text-generation-launcher --model-id $name`, then POST `{"inputs": TEXT}` to `/generate`; it
always adds the tokenizer's start tokens, so prefer its chat interface where the text has its own.
$stops

llama.cpp, with the script in its source:

```bash
python convert_hf_to_gguf.py $name --outfile $name.gguf --outtype f16
llama-server -m $name.gguf
```

To quantise, keep the embeddings: `llama-quantize --token-embedding-type f16 …`.

## Limits

- **A document can act as tokens.** A server that is sent text reads `<|virtual_1|>` or
  `<|virtual_tokens|>`, and control tokens, wherever they stand, in passages and questions too.
  Remove them from what you do not trust, or send ids, as vLLM and llama.cpp take them: tokenise
  passages and questions with `split_special_tokens=True` and join. `example.ids` shows the result.
- **The tokens are for reading.** Each one's row of the output layer is the mean of the rows of the
  256 real tokens least likely in the example: greedy search never chooses it, and sampling at most
  as often as such a mean can be (in the example: $probability for all of them together, at its
  highest). transformers also forbids them (`suppress_tokens`). To forbid them in other servers,
  give their ids a `logit_bias` of -100.
- **Input and output embeddings are untied** (`tie_word_embeddings: false`). Servers that tie them
  for a kind of model, whatever its configuration says, would read the tokens' embeddings as output
  rows: llama.cpp's converter leaves out the output layer of Gemma models, and older vLLM refuses
  them untied. Use `logit_bias` there.
"""
