"""CLIP's tokenizer: text in, out come the 77 ids that CLIP's text tower reads. The same ids as OpenAI's, for any text.

    CLIPTokenizer()("a photo of a cat")  ->  tensor([[49406, 320, 1125, 539, 320, 2368, 49407, 0, 0, ...]])

Byte-pair encoding in one paragraph: a word starts as its UTF-8 bytes, one token each, the last one marked as a word's
end. Training looked for the most frequent pair of neighbouring tokens, merged it into a new token, and did so 48,894
times. Encoding replays those merges in the same order: "cat" is c·a·t_, then c·at_, then cat_. A frequent word ends up
as one token, a rare one as several, and no text is out of reach, because every byte is a token.

    token id   0 … 255   256 … 511              512 … 49405             49406   49407
    meaning    a byte    a byte ending a word   merge 0 … merge 48893   start   end
"""
import gzip
import html
import zlib
from heapq import heapify, heappop, heappush
from itertools import pairwise, takewhile
from pathlib import Path

import ftfy
import regex
import torch

MERGES_PATH = Path(__file__).parent / "assets" / "clip_merges.txt.gz"
NUM_MERGES = 48_894
START, END = 512 + NUM_MERGES, 512 + NUM_MERGES + 1

# CLIP numbers the bytes in this order: those that Latin-1 can print, then the rest. Its merges file spells a printable
# byte as that character and the rest as the characters from 256 on, so that no token in it contains a blank.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES = PRINTABLE + [byte for byte in range(256) if byte not in PRINTABLE]  # token id -> byte
BYTE_IDS = {byte: i for i, byte in enumerate(BYTES)}
SPELLING = [chr(byte) for byte in PRINTABLE] + [chr(256 + n) for n in range(256 - len(PRINTABLE))]

# A word: a special token, an English ending such as 's, a run of letters, one digit, or a run of anything else but
# blanks. The text is in lower case already; ignoring case only lets "'ſ" count as 's, as it does in CLIP.
WORD = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
                     r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


class CLIPTokenizer:
    """Text to ids and back. merges_path: another copy of CLIP's merges, gzipped text with one merge a line."""

    def __init__(self, merges_path=None):
        pairs = read_merges(merges_path or MERGES_PATH)
        self.merges = {pair: 512 + n for n, pair in enumerate(pairs)}  # a lower id is an earlier merge
        self.vocabulary = [bytes([b]) for b in BYTES] + [bytes([b]) + b" " for b in BYTES]  # token id -> its bytes
        for left, right in pairs:
            self.vocabulary.append(self.vocabulary[left] + self.vocabulary[right])
        self.vocabulary += [b"", b""]  # start, end

        # The ids of every word met so far: texts repeat their words.
        # As in CLIP, a text that spells out a special token gets that token.
        self.words = {"<|startoftext|>": [START], "<|endoftext|>": [END]}

    def __call__(self, texts, context_length=77, truncate=False):
        """A str or a list of N -> LongTensor (N, context_length): start, the text's ids, end, then zeros.

        ValueError if a text does not fit, unless `truncate`: then it is cut and its last id is the end token.
        """
        texts = [texts] if isinstance(texts, str) else texts
        result = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(result, texts):
            ids = [START, *self.encode(text), END]
            if len(ids) > context_length:
                if not truncate or context_length < 2:
                    raise ValueError(f"text is {len(ids)} tokens long, {context_length} fit; it begins {text[:60]!r}")
                ids[context_length - 1:] = [END]
            row[:len(ids)] = torch.tensor(ids)
        return result

    def encode(self, text):
        """The ids of a text, without start and end. Repairs broken Unicode and HTML entities; upper case is lost."""
        if not isinstance(text, str):
            raise TypeError(f"expected a str, got {text!r:.60}")
        text = html.unescape(html.unescape(ftfy.fix_text(text))).lower()  # twice, for "&amp;lt;"
        # CLIP collapses blanks here, which changes nothing: WORD skips them.
        ids = []
        for word in WORD.findall(text):
            if word not in self.words:
                self.words[word] = self.merge(word.encode("utf-8"))
            ids += self.words[word]
        return ids

    def merge(self, word):
        """Byte-pair encode one word (bytes) into ids: the earliest merge first; of equal ones, the leftmost.

        In plain words, with a scan of the whole word for every merge, n² steps for n bytes:

            while True:
                known = [pair for pair in pairwise(ids) if pair in self.merges]
                if not known:
                    return ids
                first = min(known, key=self.merges.get)    # the earliest merge; of equal ones, the leftmost
                i = list(pairwise(ids)).index(first)
                ids[i:i + 2] = [self.merges[first]]

        The code below does the same in n log n steps, with a heap of possible merges and a linked list of neighbours.
        What a merge makes can only be merged later than itself, so that the heap gives merges in order.
        """
        ids = [BYTE_IDS[byte] for byte in word]
        ids[-1] += 256  # this byte ends the word
        ids.append(None)  # a sentinel that merges with nothing, for both ends: before[0] is -1, and ids[-1] is this one
        before, after = list(range(-1, len(word))), list(range(1, len(ids)))
        heap = [(self.merges[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in self.merges]
        heapify(heap)
        while heap:
            merged, i = heappop(heap)
            j = after[i]
            if self.merges.get((ids[i], ids[j])) != merged:
                continue  # an earlier merge has taken one of the two
            ids[i], ids[j] = merged, None
            after[i] = after[j]
            before[after[i]] = i
            for left, right in ((before[i], i), (i, after[i])):
                if (ids[left], ids[right]) in self.merges:
                    heappush(heap, (self.merges[ids[left], ids[right]], left))
        return [i for i in ids if i is not None]

    def decode(self, ids):
        """The text of a list of ids (or of one row of a call's result), its words and marks apart: "don 't".

        Start tokens are left out and the first end token ends the text, so the padding behind it never shows.
        Bytes that are not UTF-8 become U+FFFD. ValueError for an id outside the vocabulary.
        """
        for i in ids:
            if not 0 <= i <= END:
                raise ValueError(f"token id {i} is outside the vocabulary, 0 to {END}")
        text = b"".join(self.vocabulary[i] for i in takewhile(lambda i: i != END, ids))
        return text.decode("utf-8", errors="replace").removesuffix(" ")


# === Appendix: reading the merges file; skip on a first reading =======================================================

def read_merges(path):
    """The pairs of token ids to merge, in order: pair n becomes token 512 + n. ValueError for a damaged file."""
    try:
        lines = gzip.decompress(Path(path).read_bytes()).decode("utf-8").splitlines()
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected gzipped UTF-8 text: {error}") from error
    if len(lines) != NUM_MERGES:
        raise ValueError(f"{path}: expected {NUM_MERGES} lines, one merge each, found {len(lines)}")

    ids = {token: i for i, token in enumerate(SPELLING + [char + "</w>" for char in SPELLING])}
    pairs = []
    for number, line in enumerate(lines, start=1):
        left, _, right = line.partition(" ")
        if left not in ids or right not in ids or left + right in ids:
            raise ValueError(f"{path}, line {number}: expected two known tokens that make a new one, found {line!r}")
        pairs.append((ids[left], ids[right]))
        ids[left + right] = len(ids)
    return pairs
