"""What transformers says of the cases in `hf_cases`, in true float64: run with transformers to write `hf_golden.json` anew."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.hf_cases import CASES, config, product, tokens, weight, write
from tests.hf_cases_third import source

MADE = re.compile(r"(slope_rate|query_decay|key_decay|diagonal_decay)$")  # which the model makes itself
REAL = (torch.float32, torch.float, torch.Tensor.float)


def golden(name: str) -> dict[str, Any]:
    """Some logits, the loss, and for every gradient its product with a wave."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    with tempfile.TemporaryDirectory() as folder:
        fields = config(name)
        (Path(folder) / "config.json").write_text(json.dumps(fields))
        whole: Any = AutoConfig.from_pretrained(folder)
        chosen = whole.get_text_config()  # of a composite model, the text alone
        fields = fields if chosen is whole else {**chosen.to_dict(), "architectures": None}
        family = AutoModelForSeq2SeqLM if chosen.is_encoder_decoder else AutoModelForCausalLM
        # Saving tells the names that files have.
        family.from_config(chosen, attn_implementation="eager").save_pretrained(folder)
        from safetensors.torch import load_file

        shapes = {n: tuple(t.shape) for n, t in load_file(Path(folder) / "model.safetensors").items() if not MADE.search(n)}
        if fields.get("tie_word_embeddings") is False and chosen.tie_word_embeddings:  # saved as tied, whatever was said
            shapes |= {"lm_head.weight": (chosen.vocab_size, chosen.hidden_size)}
        write(Path(folder), fields, {n: weight(n, s) for n, s in shapes.items()})
        options: Any = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32}
        model = family.from_pretrained(folder, **options).double().eval()
    return {"shapes": shapes, **measured(model)}


def measured(model: Any) -> dict[str, Any]:
    """The forward and backward in float64: what the code calls float32 is float64 while it runs."""
    torch.float32 = torch.float = torch.float64  # type: ignore[misc]
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    torch.set_default_dtype(torch.float64)
    for module in model.modules():
        if hasattr(module, "get_slope_rate"):  # tables that were made in float32
            module.slope_rate = module.get_slope_rate()
            module.query_decay, module.key_decay, module.diagonal_decay = module.decay_factors(module.slope_rate)
        if hasattr(module, "_rnn_scan"):  # its default was float32 before any of this
            module._rnn_scan = partial(module._rnn_scan, acc_dtype=torch.float64)
    try:
        pair = model.config.is_encoder_decoder
        given = {"input_ids": source(), "decoder_input_ids": tokens()} if pair else {"input_ids": tokens()}
        logits = model(**given, use_cache=False).logits
        wanted = tokens()[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted.flatten())
        loss.backward()
    finally:
        torch.set_default_dtype(REAL[0])
        torch.float32, torch.float, torch.Tensor.float = REAL  # type: ignore[misc, method-assign]
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {
        "logits": logits.detach()[:, ::6, ::13].flatten().tolist(),
        "loss": float(loss),
        "gradients": {n: float(product(g)) for n, g in grads.items()},
    }


if __name__ == "__main__":
    found = {name: golden(name) for name in (sys.argv[1:] or CASES)}
    path = Path(__file__).with_name("hf_golden.json")
    old = json.loads(path.read_text()) if path.exists() else {}
    lines = [f"{json.dumps(name)}: {json.dumps(case, sort_keys=True)}" for name, case in sorted({**old, **found}.items())]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
