"""Which files of a checkpoint make its tokenizer."""

from pathlib import Path

from ..errors import CheckpointError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def read_tokenizer_files(directory: Path) -> dict[str, bytes]:
    """File name -> content of the tokenizer files in ``directory``.

    Raises:
        CheckpointError: there is no ``tokenizer.json``.
    """
    if not (directory / "tokenizer.json").is_file():
        if (directory / "tokenizer.model").is_file():
            raise CheckpointError(
                f"{directory}: has only a sentencepiece tokenizer (tokenizer.model); write a tokenizer.json with: "
                'python -c "from transformers import AutoTokenizer as T; '
                f"T.from_pretrained('{directory}').save_pretrained('{directory}')\""
            )
        raise CheckpointError(f"{directory / 'tokenizer.json'}: the file is missing; a checkpoint needs it")
    paths = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    return {path.name: path.read_bytes() for path in paths}
