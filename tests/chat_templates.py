"""Chat templates of the shapes that published models have, written for the tests.

Each marks what the assistant writes with ``generation``, so that transformers itself can say which
tokens those are. Tokens stand in for the real ones; the turns they take are what matters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"


@dataclass(frozen=True)
class Template:
    """A template, its tokens, and how a conversation's last turn is given to it."""

    text: str
    bos: str | None
    eos: str
    tokens: tuple[str, ...] = ()
    opens_think: bool = False  # the generation prompt ends inside a think section
    keeps_think: bool = False  # it renders ``reasoning_content`` of the last turn
    options: dict[str, Any] = field(default_factory=dict)

    def turn(self, think: str | None, response: str) -> dict[str, str]:
        """The assistant's turn as this template wants it."""
        if think is None:
            return {"role": "assistant", "content": response}
        if self.keeps_think:
            return {"role": "assistant", "content": response, "reasoning_content": think}
        text = f"<think>\n{think}\n</think>\n\n{response}"
        return {"role": "assistant", "content": text}


CHATML = Template(
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    bos=None,
    eos="<|im_end|>",
    tokens=("<|im_start|>",),
)
LLAMA3 = Template(
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content | trim + '<|eot_id|>' }}{% endgeneration %}{% else %}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    tokens=("<|start_header_id|>", "<|end_header_id|>"),
)
# Opens the section itself, and forgets it in what was said before.
DEEPSEEK_R1 = Template(
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '" + USER + "' + m.content }}{% else %}"
    "{{ '" + ASSISTANT + "' }}{% generation %}{{ m.content.split('</think>')[-1] | trim }}"
    "{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "<think>\n' }}{% endif %}",
    bos="<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    eos="<\uff5cend\u2581of\u2581sentence\uff5c>",
    tokens=(USER, ASSISTANT),
    opens_think=True,
)
# Keeps the last turn's section, and writes an empty one where thinking is switched off.
QWEN3 = Template(
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{% if m.reasoning_content and loop.last %}"
    "{{ '<think>\n' + m.reasoning_content.strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content.lstrip('\n') + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
    bos=None,
    eos="<|im_end|>",
    tokens=("<|im_start|>",),
    keeps_think=True,
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "deepseek-r1": DEEPSEEK_R1, "qwen3": QWEN3}


def dress(folder: Path, template: Template) -> Any:
    """The tokenizer in ``folder`` with another template and its tokens.

    Where the template writes BOS, the tokenizer adds one as well, as Llama's and DeepSeek's do.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(template.tokens), special_tokens=True)
    tokenizer.add_special_tokens({"eos_token": template.eos})
    if template.bos:
        tokenizer.add_special_tokens({"bos_token": template.bos})
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{template.bos} $A", special_tokens=[(template.bos, tokenizer.bos_token_id)]
        )
    tokenizer.chat_template = template.text
    return tokenizer
