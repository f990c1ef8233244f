"""clip_tokenizer.py against open_clip's SimpleTokenizer, and against ids of OpenAI's own code."""
import gzip
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from clip_tokenizer import END, MERGES_PATH, NUM_MERGES, START, CLIPTokenizer  # noqa: E402

KNOWN_IDS = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "a photo of a cartoon character": [320, 1125, 539, 320, 7651, 4009],
    "Hello, World!": [3306, 267, 1002, 256],
    "don't": [847, 713],
    # a long s is an s to the pattern, so this is one 'ſ, not a mark and a letter
    "it'ſ": [585, 6, 129, 379],
    "2024": [273, 271, 273, 275],
    "naïve café": [1097, 35689, 563, 15304],
    "schÃ¶n": [844, 7255, 333],
    "&amp;lt;3": [283, 274],
    "İSTANBUL STRASSE straße": [328, 16384, 11231, 1894, 8938, 1894, 127, 253, 324],
    "日本語": [39121, 44353, 34002, 508],
    "👩‍👩‍👧": [26304, 26304, 964, 356],
    "\ud800": [39802],  # a lone surrogate is read as U+FFFD
    "": [],
    " \t\r\n\u00a0\u3000": [],
    "\0": [],
    "<|startoftext|>a <|ENDOFTEXT|>": [START, 320, END],
    "<|ſtartoftext|>": [27, 91, 129, 123, 2002, 6659, 18169, 91, 285],
    "<start_of_text>": [283, 1572, 318, 539, 318, 4160, 285],
}
WORDS = ("A photo of THE person's don't WE'LL I'm they've you'RE he'd ukiyo-e cartoon_character "
         "'tis o'clock").split()
PIECES = {
    "English": WORDS + ["!", "?!", "...", "--", "@home", "#art", "http://a.b/c?d=e&f",
                        "antidisestablishmentarianism"],
    "mixed case": ["İ", "I", "ı", "ß", "ẞ", "ΟΔΟΣ", "ΣΑΣ", "ǅ", "ŉ", "ﬁ", "ſ", "it'ſ", "\u212a",
                   "ÀÉÎ", "Ⅷ", "Ⓐ"],
    "digits": ["2024", "3.14", "1,000", "٣٤", "½", "²", "①", "１２", "4th", "0x1F", "𝟘"],
    "emoji": ["😀", "👍🏽", "👩‍👩‍👧", "🇫🇷", "❤️", "☺", "1️⃣", "🏴\U000e0067\U000e0062\U000e007f",
              "\u200d", "\ufe0f"],
    "CJK": ["日本語", "絵画", "浮世絵", "한국어", "\u1112\u1161\u11ab", "ｶﾞ", "。", "「", "𠮷", "か\u3099",
            "\u3000"],
    "combining marks": ["e\u0301", "\u0301", "o\u0308\u0304", "z\u0351\u036f\u0322", "\u0303n",
                        "q\u20dd", "नमस्ते",
                        "ไทย"],
    "right to left": ["שלום", "שָׁלוֹם", "مرحبا", "سَلَام", "\u200f", "\u202e", "\u2067", "لا", "ﷺ",
                      "؟"],
    "HTML entities": ["&amp;", "&amp;lt;", "&amp;amp;gt;", "&#39;", "&amp;#39;", "&#x1F600;",
                      "&#0;", "&#xD800;", "&#133;",
                      "&#28;", "&nbsp;", "&lt", "&notit;", "&", ";", "&#;", "&unknown;",
                      "&AMP;", "&Eacute;",
                      "<b>", "</w>"],
    "mojibake": ["schÃ¶n", "â€™", "donâ€™t", "Ã", "ï»¿", "doesnÂ´t", "âœ”", "Ð¿Ñ€Ð¸", "l’humanitÃ©",
                 "\x91q\x92",
                 "ä½ å¥½"],
    "control characters": ["\0", "\a", "\b", "\v", "\f", "\x1b[31m", "\x1c", "\x1f", "\x7f", "\x85",
                           "\x9f", "\ufeff",
                           "\u2028", "\u200b", "\ufffe", "\U000fffff"],
    "surrogates": ["\ud800", "\udc00", "\ud83d\ude00", "\ude00\ud83d", "\udfff"],
    "special tokens": ["<|startoftext|>", "<|endoftext|>", "<|STARTOFTEXT|>", "<|endoftext",
                       "<|ſtartoftext|>",
                       "&lt;|endoftext|&gt;", "<start_of_text>", "<end_of_text>", "<|", "|>"],
}


def random_texts(kind, count=400):
    """Texts of pieces of one kind, other words and any code points, some with blanks between."""
    draw = random.Random(kind)
    for _ in range(count):
        pieces = draw.choices(PIECES[kind], k=draw.randint(1, 8))
        pieces += draw.choices(WORDS, k=draw.randint(0, 2))
        pieces += [chr(draw.randrange(0x110000)) for _ in range(draw.randint(0, 1))]
        draw.shuffle(pieces)
        yield "".join(piece + draw.choice(["", "", " ", "  ", "\n", "\t", "\u00a0"])
                      for piece in pieces)


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer()


@pytest.fixture(scope="module")
def peer():
    """open_clip's copy of OpenAI's tokenizer.

    It spells the special tokens differently, so that it is given OpenAI's spelling here.
    """
    pytest.importorskip("open_clip")
    from open_clip.tokenizer import SimpleTokenizer, re

    peer = SimpleTokenizer()
    pattern = peer.pat.pattern
    for theirs, openai in (("<start_of_text>", "<|startoftext|>"),
                           ("<end_of_text>", "<|endoftext|>")):
        assert theirs in pattern
        pattern = pattern.replace(theirs, re.escape(openai))
        peer.encoder[openai] = peer.encoder.pop(theirs)
        peer.cache[openai] = openai
        del peer.cache[theirs]
    peer.pat = re.compile(pattern, peer.pat.flags)
    return peer


# Encoding


@pytest.mark.parametrize("text", KNOWN_IDS)
def test_a_text_gets_the_ids_that_openais_code_gives(tokenizer, text):
    assert tokenizer.encode(text) == KNOWN_IDS[text]


@pytest.mark.parametrize("kind", PIECES)
def test_random_texts_of_every_kind_get_the_ids_of_the_peer(tokenizer, peer, kind):
    for text in random_texts(kind):
        assert tokenizer.encode(text) == peer.encode(text), ascii(text)


def test_every_latin_greek_and_cyrillic_character_gets_the_ids_of_the_peer(tokenizer, peer):
    for code in range(0x530):
        for text in (f"a{chr(code)}b", f"&#{code};", f"'{chr(code)} &amp;#{code}"):
            assert tokenizer.encode(text) == peer.encode(text), ascii(text)


@pytest.mark.parametrize("letters",
                         ["a", "ha", "ab!", "etaoin shrdlu", "日本語", "abcdefghijklmnopqrstuvwxyz"])
def test_long_words_get_the_ids_of_the_peer(tokenizer, peer, letters):
    draw = random.Random(letters)
    for text in (letters * 100, "".join(draw.choices(letters, k=600))):
        assert tokenizer.encode(text) == peer.encode(text)


def test_what_a_caller_does_to_the_ids_does_not_reach_the_next_caller(tokenizer):
    tokenizer.encode("cat").append(0)
    assert tokenizer.encode("cat") == [2368]


def test_something_that_is_not_a_text_is_refused(tokenizer):
    with pytest.raises(TypeError, match="expected a str, got None"):
        tokenizer(["a cat", None])
    with pytest.raises(TypeError, match="expected a str, got b'a cat'"):
        tokenizer.encode(b"a cat")


# Batches of a fixed length


def test_a_call_gives_start_ids_end_and_zeros_up_to_77(tokenizer):
    tokens = tokenizer(["a photo of a cat", ""])
    assert tokens.dtype == torch.long
    assert tokens.tolist() == [[START, 320, 1125, 539, 320, 2368, END] + [0] * 70,
                               [START, END] + [0] * 75]


def test_one_str_is_a_batch_of_one_and_an_empty_list_a_batch_of_none(tokenizer):
    assert tokenizer("a cat").tolist() == tokenizer(["a cat"]).tolist()
    assert tokenizer([]).shape == (0, 77)


def test_a_batch_is_the_batch_of_the_peer(tokenizer, peer):
    texts = [text for kind in PIECES for text in random_texts(kind, count=20)]
    # the peer cuts the others
    texts = [text for text in texts if len(tokenizer.encode(text)) <= 75]
    assert len(texts) > 200
    assert torch.equal(tokenizer(texts), peer(texts))


def test_75_ids_fit_and_76_do_not(tokenizer):
    assert tokenizer("cat " * 75)[0].tolist() == [START] + [2368] * 75 + [END]
    with pytest.raises(ValueError, match="text is 78 tokens long, 77 fit; it begins 'cat cat"):
        tokenizer(["short", "cat " * 76])
    assert tokenizer("cat cat", context_length=4).tolist() == [[START, 2368, 2368, END]]


@pytest.mark.parametrize("count", [0, 74, 75, 76, 500])
def test_a_text_is_cut_as_openai_cuts_it(tokenizer, count):
    text = "cat dog " * count
    ids = [START, *tokenizer.encode(text), END]
    if len(ids) > 77:  # as in CLIP's `tokenize(..., truncate=True)`
        ids = ids[:77]
        ids[-1] = END
    assert tokenizer(text, truncate=True)[0].tolist() == ids + [0] * (77 - len(ids))


def test_a_very_long_text_is_shortened_in_the_error(tokenizer):
    with pytest.raises(ValueError, match="text is 5002 tokens long") as error:
        tokenizer("cat\n" * 5000)
    assert len(str(error.value)) < 160 and "\n" not in str(error.value)


def test_a_context_without_room_for_start_and_end_is_refused(tokenizer):
    with pytest.raises(ValueError, match="text is 2 tokens long, 1 fit"):
        tokenizer("", context_length=1)


# Decoding


@pytest.mark.parametrize("text", ["a photo of a cat", "ukiyo - e", "naïve café", "日本語", "👩‍👩‍👧 !",
                                  "שלום , مرحبا", ""])
def test_decoding_undoes_encoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", [kind for kind in PIECES
                                  if kind not in ("special tokens", "HTML entities")])
def test_decoding_agrees_with_the_peer_but_for_its_last_blank(tokenizer, peer, kind):
    for text in random_texts(kind, count=50):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == peer.decode(ids).removesuffix(" "), ascii(text)


def test_decoding_a_row_leaves_out_start_end_and_padding(tokenizer):
    row = tokenizer("a Cat says wow!")[0]
    assert tokenizer.decode(row) == tokenizer.decode(row.tolist()) == "a cat says wow !"
    assert tokenizer.decode([]) == tokenizer.decode([START, END, 0, 0]) == ""


def test_half_a_character_is_decoded_to_the_replacement_character(tokenizer):
    first_byte, *_ = tokenizer.encode("\U0001f9ff")
    assert tokenizer.decode([320, first_byte]) == "a \ufffd"


@pytest.mark.parametrize("ids, bad",
                         [([320, -1], -1), ([49408], 49408), (torch.tensor([END, 99999]), 99999)])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer, ids, bad):
    with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary, 0 to 49407"):
        tokenizer.decode(ids)


def test_every_token_decodes_to_the_bytes_of_the_peers_token(tokenizer, peer):
    for token in range(START):
        spelled = peer.decoder[token]
        end = " " if spelled.endswith("</w>") else ""
        theirs = bytes(peer.byte_decoder[char] for char in spelled.removesuffix("</w>"))
        assert tokenizer.vocabulary[token] == theirs + end.encode()


# The merges file


@pytest.fixture
def merges_file(tmp_path):
    """Writes a merges file: the lines of the real one, changed by a function. Gives its path."""
    def write(change):
        lines = gzip.decompress(MERGES_PATH.read_bytes()).decode("utf-8").splitlines()
        path = tmp_path / "merges.txt.gz"
        path.write_bytes(gzip.compress("\n".join(change(lines)).encode("utf-8")))
        return path
    return write


def test_the_merges_are_the_published_ones():
    open_clip = pytest.importorskip("open_clip")
    path = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    published = gzip.decompress(path.read_bytes()).splitlines()
    ours = gzip.decompress(MERGES_PATH.read_bytes()).splitlines()
    assert ours == published[1:1 + NUM_MERGES]


def test_a_copy_of_the_merges_file_works_as_well(merges_file):
    tokenizer = CLIPTokenizer(merges_file(lambda lines: lines))
    assert tokenizer.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]


@pytest.mark.parametrize("change, found", [
    (lambda lines: lines[:-1], 48893),
    (lambda lines: lines + ["c at</w>"], 48895),
    (lambda lines: [], 0),
])
def test_a_merges_file_with_another_number_of_lines_is_refused(merges_file, change, found):
    path = merges_file(change)
    with pytest.raises(ValueError,
                       match=f"merges.txt.gz: expected 48894 lines, one merge each, found {found}"):
        CLIPTokenizer(path)


@pytest.mark.parametrize("line", ["in", "i n g", "#version: 0.2", "", "i zzzzzz", "t h"])
def test_a_merges_file_with_a_wrong_line_is_refused(merges_file, line):
    path = merges_file(lambda lines: lines[:9] + [line] + lines[10:])
    message = f"merges.txt.gz, line 10: expected two known tokens .* found '{line}'"
    with pytest.raises(ValueError, match=message):
        CLIPTokenizer(path)


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1000],
    lambda data: data[:100_000] + b"damaged" + data[100_007:],
    lambda data: gzip.decompress(data),
    lambda data: gzip.compress(b"\xff" + gzip.decompress(data)),
], ids=["cut short", "overwritten", "not compressed", "not UTF-8"])
def test_a_damaged_merges_file_is_refused(tmp_path, damage):
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(damage(MERGES_PATH.read_bytes()))
    with pytest.raises(ValueError, match="merges.txt.gz: expected gzipped UTF-8 text"):
        CLIPTokenizer(path)


def test_a_missing_merges_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.txt.gz"):
        CLIPTokenizer(tmp_path / "nowhere.txt.gz")
