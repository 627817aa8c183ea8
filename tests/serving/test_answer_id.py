import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.answer_id import make_answer_id, resolve
from serving.errors import AnswerIdError

KEY = b"k" * 32
# One for all draws of a run: an id holds random bytes, and what is drawn must not depend on them.
MADE = make_answer_id("desk", 7, KEY)


@given(st.from_regex(r"[a-z][a-z0-9-]{0,40}", fullmatch=True), st.integers(0, 2**32 - 1))
def test_an_id_resolves_to_what_it_was_made_for(stream, version):
    made = make_answer_id(stream, version, KEY)
    assert resolve(made, KEY) == (stream, version)
    assert made != make_answer_id(stream, version, KEY)


@given(st.data())
def test_no_changed_id_resolves(data):
    at = data.draw(st.integers(len("chatcmpl-"), len(MADE) - 2))  # the last character holds unused bits
    other = data.draw(st.sampled_from("ABCabc019-_").filter(lambda c: c != MADE[at]))
    with pytest.raises(AnswerIdError, match="was not made by this service"):
        resolve(MADE[:at] + other + MADE[at + 1 :], KEY)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "chatcmpl-",
        "chatcmpl-AAAA",
        "chatcmpl-é",
        pytest.param(make_answer_id("d", 1, b"x" * 32), id="other key"),
    ],
)
def test_what_is_no_id_is_refused(text):
    with pytest.raises(AnswerIdError):
        resolve(text, KEY)
