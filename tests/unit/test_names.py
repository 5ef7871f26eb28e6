"""Distinguished names. What GnuTLS makes of each text was seen by running the C suite."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.certificates import elements
from vtpm_cuse.ca.names import common_name, directory_name, escaped

PRINTABLE, UTF8, IA5 = 0x13, 0x0C, 0x16


def rows(name: bytes) -> list[tuple[str, int, str]]:
    """Last three digits of the identifier, string tag, text."""
    ((_, components),) = elements(name)
    found = []
    for _, component in elements(components):
        ((_, pair),) = elements(component)
        (_, identifier), (tag, text) = elements(pair)
        found.append((identifier.hex()[-2:], tag, text.decode()))
    return found


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "C=US,ST=NY,L=NewYork",
            [("07", PRINTABLE, "NewYork"), ("08", PRINTABLE, "NY"), ("06", PRINTABLE, "US")],
        ),
        (r"CN=a\,b,O=x y", [("0a", PRINTABLE, "x y"), ("03", PRINTABLE, "a,b")]),
        ("OU=ä", [("0b", UTF8, "ä")]),
        ("EMAIL=a@b,DC=de", [("19", IA5, "de"), ("01", IA5, "a@b")]),
        ("CN=a;O=b", [("03", UTF8, "a;O=b")]),
        (" CN = a , O = b ", [("0a", PRINTABLE, "b"), ("03", PRINTABLE, "a")]),
        ("cn=a", [("03", PRINTABLE, "a")]),
        ("CN=a=b", [("03", PRINTABLE, "a=b")]),
        ("CN=_", [("03", UTF8, "_")]),
        ("C=USA", [("06", PRINTABLE, "USA")]),
        ("CN=a,", [("03", PRINTABLE, "a")]),
        (r"CN=a\+b", [("03", PRINTABLE, "a+b")]),
        ("CN=a\\ ", [("03", PRINTABLE, "a ")]),
        ("2.5.4.3=a", [("03", PRINTABLE, "a")]),
        (" 2.5.4.3 = a ,2.5.4.6=US", [("06", PRINTABLE, "US"), ("03", PRINTABLE, "a")]),
        ("2.5.4.3=#0c0161", [("03", UTF8, "a")]),
        ("1.2.840.113549.1.9.1=a@b", [("01", IA5, "a@b")]),
        ("0.9.2342.19200300.100.1.25=x", [("19", IA5, "x")]),
        ("1.2.3.4=#0c0161", [("04", UTF8, "a")]),
        ("CN=a,CN=b", [("03", PRINTABLE, "b"), ("03", PRINTABLE, "a")]),
    ],
)
def test_names_as_gnutls_makes_them(text: str, wanted: list[tuple[str, int, str]]) -> None:
    assert rows(directory_name(text)) == wanted


@pytest.mark.parametrize(
    "text",
    [
        *("", ",", "CN", "CN=", "CN= ", "FOO=a", "1.2.3=a", "CN=a+OU=b", 'CN="a"', "EMAIL=ä"),
        *("CN=a,O", ",CN=a", "CN=a,,O=b", ",,", "CN=a,,", " ,CN=a", "1=#0c0161", "1.2=#0c0161"),
        *("3.2.1=#0c0161", "1.40.1=#0c0161", "1.2.03=#0c0161", "1.2.3.=#0c0161", "1.2.3.4="),
        *("OID.2.5.4.3=a", r"1.2.3.4=\#0c", "1.2.3.4=#020105", "1.2.99999999999=#0c0161"),
        "1.2.\u0663=#0c0161",
    ],
)
def test_texts_that_are_no_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        directory_name(text)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (r"CN=Jos\C3\A9", [("03", UTF8, "José")]),
        (r"CN=a\2Cb", [("03", PRINTABLE, "a,b")]),
        (r"CN=a\2cb\2Bc", [("03", PRINTABLE, "a,b+c")]),
        (r"CN=a\20", [("03", PRINTABLE, "a ")]),
        (r"CN=\20a", [("03", PRINTABLE, " a")]),
        (r"CN=a\5C2C", [("03", UTF8, r"a\2C")]),
        (r"CN=a\\2C", [("03", UTF8, r"a\2C")]),
        (r"CN=\#1\;\<\>\=", [("03", UTF8, "#1;<>=")]),
        ("CN=#0c0161", [("03", UTF8, "a")]),
        ("CN = #13026162 ,O=b", [("0a", PRINTABLE, "b"), ("03", PRINTABLE, "ab")]),
        (r"DC=#16016C", [("19", IA5, "l")]),
    ],
)
def test_values_are_decoded_as_the_rfc_says(text: str, wanted: list[tuple[str, int, str]]) -> None:
    assert rows(directory_name(text)) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (r"CN=a\zb", r"'\\z' stands for nothing"),
        (r"CN=a\2", r"'\\2' stands for nothing"),
        (r"CN=a\C3", "no text in UTF-8"),
        (r"CN=a\C3b\A9", "no text in UTF-8"),
        (r"CN=a\00", "zero byte"),
        ("CN=a\\", "nothing behind it"),
        ("CN=#", "no string's encoding"),
        ("CN=#0c01", "damaged"),
        ("CN=#0c0261", "damaged"),
        ("CN=#0c016161", "damaged"),
        ("CN=#0c00", "damaged"),
        ("CN=#0c01ff", "damaged"),
        ("CN=#0c0100", "damaged"),
        ("CN=#020101", "no string's encoding"),
        ("CN=#1", "no string's encoding"),
        ("CN=#vm", "no string's encoding"),
    ],
)
def test_values_that_cannot_be_decoded_are_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        directory_name(text)


@given(st.text(min_size=1).filter(lambda text: "\0" not in text))
def test_a_value_in_hex_is_that_value(text: str) -> None:
    pairs = "".join(f"\\{octet:02x}" for octet in text.encode()[:1000])
    try:
        wanted = common_name(text)
    except ValueError:
        return
    if len(text.encode()) <= 1000:
        assert directory_name("CN=" + pairs) == wanted


@given(st.text())
def test_any_text_gives_a_name_or_value_error(text: str) -> None:
    try:
        name = directory_name(text)
    except ValueError:
        return
    assert len(list(elements(name))) == 1


@given(st.text(min_size=1, max_size=60).filter(lambda text: text.strip() == text))
def test_an_escaped_value_is_a_name(value: str) -> None:
    assert directory_name("CN=" + escaped(value)) == common_name(value)
