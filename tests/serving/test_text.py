import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.text import TextStream


@pytest.fixture(scope="module")
def tokenizer(tiny):
    from learner.base import load_tokenizer

    return load_tokenizer(tiny).backend_tokenizer


def pieces(tokenizer, ids, stop=()):
    stream = TextStream(tokenizer, stop)
    out = []
    for token in ids:
        out.append(stream.push(token))
        if stream.stopped:
            break
    return [*out, stream.finish()]


TEXTS = st.text(max_size=30)
IDS = st.lists(st.integers(0, 151_642), max_size=20)


def test_pieces_put_together_are_the_decoded_ids(tokenizer):
    @given(st.one_of(TEXTS.map(lambda text: tokenizer.encode(text).ids), IDS))
    def check(ids):
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)

    check()


def test_no_piece_ends_inside_a_character(tokenizer):
    ids = tokenizer.encode("🙂👩‍👩‍👧 ü 汉字 🇫🇷").ids
    out = pieces(tokenizer, ids)
    assert not any("\ufffd" in piece for piece in out)
    assert len([piece for piece in out if piece]) > 3


def test_stop_texts_cut_where_a_search_in_the_whole_text_would(tokenizer):
    @given(
        st.text(alphabet="ab ü", max_size=40),
        st.lists(st.text(alphabet="ab ü", min_size=1, max_size=4), max_size=3),
    )
    def check(text, stop):
        shown = "".join(pieces(tokenizer, tokenizer.encode(text).ids, tuple(stop)))
        whole = tokenizer.decode(tokenizer.encode(text).ids)
        found = [whole.find(s) for s in stop if s in whole]
        # A stop text that begins earlier but completes later may lose to one that completes first.
        assert whole.startswith(shown)
        assert not any(s in shown for s in stop)
        assert (len(shown) < len(whole)) == bool(found)
        if len(stop) == 1 and found:
            assert len(shown) == found[0]

    check()
