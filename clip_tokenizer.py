"""CLIP's tokenizer: text in, out come the 77 ids that CLIP's text tower reads.

The ids are the same as OpenAI's, for any text:

    CLIPTokenizer()("a photo of a cat") -> tensor([[49406, 320, 1125, 539, 320, 2368, 49407, ...]])

Byte-pair encoding in one paragraph: a word starts as its UTF-8 bytes, one token each, the last one
marked as a word's end. Training looked for the most frequent pair of neighbouring tokens, merged it
into a new token, and did so 48,894 times. Encoding replays those merges in the same order: "cat" is
c·a·t_, then c·at_, then cat_. A frequent word ends up as one token, a rare one as several, and no
text is out of reach, because every byte is a token.

    token id   0 … 255   256 … 511              512 … 49405             49406   49407
    meaning    a byte    a byte ending a word   merge 0 … merge 48893   start   end
"""
import gzip
import html
import zlib
from itertools import pairwise
from pathlib import Path

import ftfy
import regex
import torch

MERGES_PATH = Path(__file__).parent / "assets" / "clip_merges.txt.gz"
NUM_MERGES = 48_894
START = 512 + NUM_MERGES
END = START + 1
CONTEXT_LENGTH = 77  # tokens that the text tower reads

# CLIP numbers the bytes in this order: first the bytes that Latin-1 can print, then the others.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTES = PRINTABLE + OTHERS  # token id -> byte
BYTE_IDS = {byte: i for i, byte in enumerate(BYTES)}

# A word: a special token, an English ending such as 's, a run of letters, one digit, or a run of
# anything else but blanks. The text is in lower case already; ignoring case only lets "'ſ" count as
# 's, as it does in CLIP.
WORD = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
                     r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


class CLIPTokenizer:
    """Text to ids and back. merges_path: another copy of CLIP's merges, see `read_merges`."""

    def __init__(self, merges_path=None):
        pairs = read_merges(merges_path or MERGES_PATH)
        self.merges = {}  # pair of ids -> id of what they make; a lower id is an earlier merge
        self.vocabulary = []  # token id -> its bytes
        self.vocabulary += [bytes([byte]) for byte in BYTES]
        self.vocabulary += [bytes([byte]) + b" " for byte in BYTES]  # ending a word
        for left, right in pairs:
            self.merges[left, right] = len(self.vocabulary)
            self.vocabulary.append(self.vocabulary[left] + self.vocabulary[right])
        self.vocabulary += [b"", b""]  # start, end

        # A cache, word -> ids: texts repeat their words. As in CLIP, a text that spells out a
        # special token gets that token.
        self.cache = {"<|startoftext|>": [START], "<|endoftext|>": [END]}

    def __call__(self, texts, context_length=CONTEXT_LENGTH, truncate=False):
        """A str or a list of N -> LongTensor (N, context_length): start, ids, end, then zeros.

        A text that does not fit is cut before its end with `truncate`. Without, it is a ValueError.
        """
        if isinstance(texts, str):
            texts = [texts]
        result = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(result, texts):
            ids = [START, *self.encode(text), END]
            if len(ids) > context_length and not truncate:
                raise ValueError(f"text is {len(ids)} tokens long, {context_length} fit; "
                                 f"it begins {text[:60]!r}")
            del ids[context_length - 1:-1]  # of a text that fits, nothing
            row[:len(ids)] = torch.tensor(ids)
        return result

    def encode(self, text):
        """The ids of a text in lower case, its Unicode and HTML repaired; no start and no end."""
        if not isinstance(text, str):
            raise TypeError(f"expected a str, got {text!r:.60}")
        text = ftfy.fix_text(text)
        text = html.unescape(html.unescape(text))  # twice, for "&amp;lt;"
        # CLIP collapses blanks here, which changes nothing: WORD skips them.
        ids = []
        for word in WORD.findall(text.lower()):
            if word not in self.cache:
                self.cache[word] = self.byte_pair_encode(word.encode("utf-8"))
            ids += self.cache[word]
        return ids

    def byte_pair_encode(self, word):
        """The ids of one word (bytes).

        The earliest merge is made first, at the leftmost of the places where it fits.

        Every merge scans the whole word, so that a word of n bytes takes n² steps: a few hundredths
        of a second even for 600 bytes, but minutes for a hundred thousand letters without a blank.
        """
        ids = [BYTE_IDS[byte] for byte in word]
        ids[-1] += 256                                 # this byte ends the word
        while True:
            known = [pair for pair in pairwise(ids) if pair in self.merges]
            if not known:
                return ids
            first = min(known, key=self.merges.get)    # the earliest merge
            i = list(pairwise(ids)).index(first)       # its leftmost place
            ids[i:i + 2] = [self.merges[first]]

    def decode(self, ids):
        """The text of a list of ids, or of one row of a call's result.

        It has blanks between all words and marks: "don 't". Start tokens are left out, and the
        first end token ends the text, so that the padding behind it never shows. Bytes that are not
        UTF-8 become U+FFFD. Raises ValueError for an id outside the vocabulary.
        """
        for i in ids:
            if not 0 <= i <= END:
                raise ValueError(f"token id {i} is outside the vocabulary, 0 to {END}")
        text = b""
        for i in ids:
            if i == END:
                break
            text += self.vocabulary[i]
        return text.decode("utf-8", errors="replace").removesuffix(" ")


# === Appendix: the modules beside this one; skip on a first reading ===============================

# Every module of PoseBridge imports this one first. A script elsewhere that has a file data.py
# beside it, as many have, would import that file in place of PoseBridge's.

import importlib.util


def check_neighbour(name):
    """Raises ImportError if another folder's module hides the one of this name beside this file."""
    ours = Path(__file__).with_name(f"{name}.py")
    found = importlib.util.find_spec(name)
    if found is None or not found.origin or not ours.samefile(found.origin):
        raise ImportError(f"expected {ours} as the module {name!r}, found "
                          f"{found and found.origin}; rename that file, or begin the script with "
                          f"sys.path.insert(0, {str(ours.parent)!r})")


check_neighbour("data")

# === Appendix: reading the merges file; skip on a first reading ===================================

from functools import lru_cache

# The file spells a byte that Latin-1 can print as that character, and the others as the characters
# from 256 on. So no token in it contains a blank, which is what stands between two tokens. SPELLING
# has the order of BYTES: entry n is the spelling of token n.
SPELLING = [chr(byte) for byte in PRINTABLE]
SPELLING += [chr(256 + n) for n in range(len(OTHERS))]


@lru_cache
def read_merges(path):
    """The pairs of token ids to merge, in order: pair n becomes token 512 + n.

    A program reads a file once, however many tokenizers it makes.

    The file has a line for each merge, its two tokens as they are spelled; "</w>" ends a word. So
    reading starts with the spelling of the first 512 tokens, and every line spells one token more.
    Raises ValueError for a damaged file.
    """
    try:
        lines = gzip.decompress(Path(path).read_bytes()).decode("utf-8").splitlines()
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected gzipped UTF-8 text: {error}") from error
    if len(lines) != NUM_MERGES:
        raise ValueError(f"{path}: expected {NUM_MERGES} lines, one merge each, found {len(lines)}")

    tokens = SPELLING + [char + "</w>" for char in SPELLING]
    ids = {token: i for i, token in enumerate(tokens)}
    pairs = []
    for number, line in enumerate(lines, start=1):
        left, _, right = line.partition(" ")
        if left not in ids or right not in ids or left + right in ids:
            raise ValueError(f"{path}, line {number}: expected two known tokens that make "
                             f"a new one, found {line!r}")
        pairs.append((ids[left], ids[right]))
        ids[left + right] = len(ids)
    return pairs
