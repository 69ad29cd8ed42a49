"""Chat templates of a model folder."""

from pathlib import Path

from tli_jax.errors import DataError
from tli_jax.hf.encoding import as_data_error, silence_stderr
from tli_jax.hf.inputs import inside, read_json


def has_chat_template(folder: Path) -> bool:
    """Whether the model has a chat template.

    Raises:
        DataError: ``tokenizer_config.json`` is damaged.
    """
    config = folder / "tokenizer_config.json"
    files = ("chat_template.jinja", "chat_template.json")
    return any((folder / name).is_file() for name in files) or (
        config.is_file() and bool(read_json(inside(folder, config.name)).get("chat_template"))
    )


def render_chat(folder: Path, prompt: str) -> str:
    """The text of a conversation in which the user has written ``prompt``, up to where the model's answer starts.

    transformers renders the template in Jinja's sandbox. The text contains all special tokens, including BOS.

    Raises:
        DataError: there is no template, or it cannot be rendered.
    """
    import transformers

    if not has_chat_template(folder):
        raise DataError(f"{folder}: the model has no chat template: use --no-chat")
    with as_data_error(f"{folder}: the chat template cannot be rendered", "use --no-chat"), silence_stderr():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        messages = [{"role": "user", "content": prompt}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
