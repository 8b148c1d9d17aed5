"""Records of flags: the fields of a dataclass are options of a verb, in the place of the parameter that holds them."""

from __future__ import annotations

import pytest

from qnext.cli import VERBS, click_command


def names(verb: str) -> list[str]:
    return [parameter.name for parameter in click_command(verb).params]


def test_fields_stand_where_the_record_stood() -> None:
    found = names("chat")
    place = found.index("max_tokens")
    assert found[place - 1] == "complete" and found[place + 1 : place + 4] == ["temperature", "top_k", "top_p"]
    assert found[found.index("stop") + 1] == "think" and found[-6:] == [
        "expert_memory",
        "speculation",
        "dtype",
        "device",
        "watermark",
        "strict",
    ]


def test_an_option_has_the_name_of_its_field_unless_it_says_others() -> None:
    flags = {parameter.name: parameter for parameter in click_command("serve").params}
    assert flags["ssl_certfile"].opts == ["--ssl-certfile"]
    assert flags["max_model_len"].opts == ["--max-model-len", "--ctx-size", "--context"]
    assert (flags["ui"].opts, flags["ui"].secondary_opts) == (["--ui"], ["--no-ui"])
    assert (flags["port"].default, flags["disk_cache_bytes"].default) == (8000, 8 << 30)


@pytest.mark.parametrize("verb", VERBS)
def test_no_record_is_left_as_a_parameter(verb: str) -> None:
    command = click_command(verb)
    for each in getattr(command, "commands", {verb: command}).values():
        assert len({parameter.name for parameter in each.params}) == len(each.params)
        for parameter in each.params:
            assert parameter.param_type_name == "argument" or parameter.opts[0].startswith("-")
