"""A config.json whose values are taken by name and checked, in old and transformers-5 spelling."""

import sys
from pathlib import Path
from typing import Any

from poweropd_megatron.errors import InputError
from poweropd_megatron.json_file import read_json
from poweropd_megatron.models.model_config import ModelConfig


class ConfigFile:
    """The object in a model folder's config.json; errors name the setting, the file, the field."""

    def __init__(self, folder: str | Path, *, setting: str) -> None:
        """Read it. Raises: InputError if there is no such folder, file or object."""
        if not Path(folder).is_dir():
            raise InputError(f"{setting}: {Path(folder).absolute()} is not a folder")
        self._place = f"{setting}: {Path(folder) / 'config.json'}"
        self._raw = read_json(Path(folder) / "config.json", setting)

    def get(self, name: str) -> Any:
        """Return a field as it stands; None if it is absent."""
        return self._raw.get(name)

    def integer(self, name: str, *, default: int | None = None) -> int:
        """Return a field that is an integer above 0; `default`, where given, if it is absent.

        Raises: InputError.
        """
        found = self._value(name, default)
        if not isinstance(found, int) or isinstance(found, bool) or found <= 0:
            raise self.error(f"{name} is {found!r}, expected an integer above 0")
        return found

    def number(self, name: str) -> float:
        """Return a field that is a finite number above 0. Raises: InputError."""
        return self._checked_number(name, self.get(name))

    def flag(self, name: str) -> bool:
        """Return a field that is true or false; false if it is absent. Raises: InputError."""
        found = self._value(name, False)
        if not isinstance(found, bool):
            raise self.error(f"{name} is {found!r}, expected true or false")
        return found

    def refuse_two_values(self, name: str, other: str) -> None:
        """Raise InputError if both spellings of a field are there, with different values."""
        values = self.get(name), self.get(other)
        if None not in values and values[0] != values[1]:
            raise self.error(f"{name} is {values[0]!r}, but {other} {values[1]!r}: remove one")

    def rotary_base(self, *, default: float | None = None) -> float:
        """Return rope_theta, from where either spelling has it.

        Raises: InputError if it has none and the family no default, or several, or if the embedding
        is scaled.
        """
        places = [self._raw]
        for name in ("rope_scaling", "rope_parameters"):
            rope = self._value(name, {})
            if not isinstance(rope, dict):
                raise self.error(f"{name} is {rope!r}, expected an object")
            self._refuse_unless("rope_type", rope.get("rope_type", rope.get("type")), "default")
            for kind, value in rope.items():
                if isinstance(value, dict):
                    raise self.error(f"{name}.{kind}, rotary angles by kind, are not supported")
            places.append(rope)
        for place in places:
            share = place.get("partial_rotary_factor")
            self._refuse_unless("partial_rotary_factor", share, 1)
        bases = [place["rope_theta"] for place in places if place.get("rope_theta") is not None]
        if not bases and default is None:
            raise self.error("has neither rope_theta nor rope_parameters.rope_theta")
        if any(base != bases[0] for base in bases):
            raise self.error(f"rope_theta is {bases[0]!r}, but elsewhere {bases[1]!r}: remove one")
        return self._checked_number("rope_theta", bases[0] if bases else default)

    def refuse_unless(self, name: str, accepted: Any) -> None:
        """Raise InputError if a field is there with another value than the one that is modelled."""
        self._refuse_unless(name, self.get(name), accepted)

    def refuse_truthy(self, *names: str) -> None:
        """Raise InputError if one of these fields is there and switches something on."""
        for name in names:
            if self.get(name):
                raise self.error(f"{name} = {self.get(name)!r} is not supported")

    def refuse_other_layers(self) -> None:
        """Raise InputError if layer_types names others than those that attend to all tokens."""
        kinds = self._value("layer_types", [])
        if not isinstance(kinds, list):
            raise self.error(f"layer_types is {kinds!r}, expected a list")
        for kind in kinds:
            if kind != "full_attention":
                raise self.error(f"layer_types has {kind!r}, which is not supported")

    def error(self, problem: str) -> InputError:
        """Return an error about this file."""
        return InputError(f"{self._place}: {problem}")

    def _value(self, name: str, default: Any) -> Any:
        found = self.get(name)
        return default if found is None else found

    def _checked_number(self, name: str, found: Any) -> float:
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        if not is_number or not 0 < found <= sys.float_info.max:
            raise self.error(f"{name} is {found!r}, expected a finite number above 0")
        return float(found)

    def _refuse_unless(self, name: str, found: Any, accepted: Any) -> None:
        if found is not None and found != accepted:
            raise self.error(f"{name} = {found!r} is not supported")


def read_decoder(
    file: ConfigFile,
    *,
    qk_layernorm: bool,
    kv_channels: int,
    num_query_groups: int,
    rotary_base: float,
) -> ModelConfig:
    """Return the dense model of a file, of which a family gives what it reads in its own way.

    Raises: InputError naming the field that is absent, malformed, or not modelled by any family.
    """
    file.refuse_truthy("attention_bias", "use_sliding_window")
    file.refuse_truthy("quantization_config", "compression_config")
    file.refuse_other_layers()
    file.refuse_unless("hidden_act", "silu")
    file.refuse_two_values("torch_dtype", "dtype")
    return ModelConfig(
        model_type=file.get("model_type"),
        num_layers=file.integer("num_hidden_layers"),
        hidden_size=file.integer("hidden_size"),
        ffn_hidden_size=file.integer("intermediate_size"),
        num_attention_heads=file.integer("num_attention_heads"),
        num_query_groups=num_query_groups,
        kv_channels=kv_channels,
        vocab_size=file.integer("vocab_size"),
        max_position_embeddings=file.integer("max_position_embeddings"),
        layernorm_epsilon=file.number("rms_norm_eps"),
        rotary_base=rotary_base,
        tie_word_embeddings=file.flag("tie_word_embeddings"),
        qk_layernorm=qk_layernorm,
    )
