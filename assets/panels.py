"""Draws the tour's pictures: images, maps and plots side by side, with what they mean below them.

`panels` is the only function that assets/tour.md calls. Text is large, because a phone shows a
picture at less than half of its size. A point or line is told by its shape as well as its colour.
"""
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

WIDTH = 800  # pixels of every picture
GAP = 6  # pixels between panels: four of a row are 192 wide, twice as wide as a crop
FONT = ImageFont.load_default(24)
LINE = 30  # pixels from one line of text to the next
RADIUS = 7  # pixels of a mark
LARGEST_PIXEL = 90  # pixels of the side of an enlarged pixel, at most

# A map's colours from its lowest value to its highest: five of viridis, which everybody can order.
MAP_COLORS = ("#440154", "#3b528b", "#21918c", "#5ec962", "#fde725")
# The colours of the first, second, ... label: those of Okabe and Ito, and white.
LABEL_COLORS = ("#d55e00", "#56b4e9", "#ffffff", "#f0e442")

MARKS = {  # the corners of the second, third and fourth label's mark, in its radius
    1: ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    2: ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    3: ((0, -1.2), (1.2, 1), (-1.2, 1)),
}


@dataclass
class Panel:
    """A picture and what is drawn over it. Points are x before y, in the picture's pixels."""
    title: str
    picture: object = None  # one of `as_image`; None is an empty plot
    over: object = None  # a map (h, w), which colours the picture where its values are high
    points: dict = field(default_factory=dict)  # {label: (n, 2)}
    lines: dict = field(default_factory=dict)  # {label: (n, 2)} closed lines through n points
    limits: tuple = None  # the values of a map's first and last colour; by default its own
    window: tuple = None  # left, top, right, bottom: the part of the picture that is shown
    grid: int = 0  # pixels of the picture between two white lines; 0: no lines
    numbers: bool = False  # whether each pixel of a map has its value written on it
    axes: tuple = ("", "")  # the names of a plot's axes


def panels(cells, columns=4):
    """A picture, 800 pixels wide, of Panels in rows of so many."""
    width = (WIDTH - GAP) // columns - GAP
    drawn = [draw_panel(cell, width) for cell in cells]
    rows = [drawn[first:first + columns] for first in range(0, len(drawn), columns)]
    heights = [max(cell.height for cell in row) + GAP for row in rows]
    sheet = Image.new("RGB", (WIDTH, sum(heights) + GAP), "white")
    top = GAP
    for row, height in zip(rows, heights):
        for place, cell in enumerate(row):
            sheet.paste(cell, (GAP + place * (width + GAP), top))
        top += height
    return sheet


def draw_panel(panel, width):
    """A Panel as an image of this width: its title, its picture, and a line for each label."""
    title = panel.title.split("\n")
    labels = [*panel.points, *panel.lines]
    picture = draw_plot(panel, width) if panel.picture is None else draw_picture(panel, width)
    top = LINE * len(title)
    height = top + picture.height + LINE * len(labels)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for number, text in enumerate(title):
        draw.text((width / 2, LINE * number), text, "black", FONT, anchor="ma")
    image.paste(picture, ((width - picture.width) // 2, top))
    for number, label in enumerate(labels):
        y = top + picture.height + LINE * (number + 0.5)
        if label in panel.points:
            draw_mark(draw, (RADIUS + 4, y), number)
        else:
            draw_line(draw, [(2, y), (2 * RADIUS + 6, y)], number)
        draw.text((2 * RADIUS + 14, y), label, "black", FONT, anchor="lm")
    return image


def draw_picture(panel, width):
    """A Panel's picture, enlarged by a whole number so that its pixels can be seen."""
    image = as_image(panel.picture, panel.limits)
    if panel.over is not None:
        image = laid_over(image, values_of(panel.over), panel.limits)
    left, top, right, bottom = panel.window or (0, 0, *image.size)
    image = image.crop((left, top, right, bottom))
    scale = width / image.width
    if scale > 1:
        scale = min(int(scale), LARGEST_PIXEL)
    size = (round(image.width * scale), round(image.height * scale))
    image = image.resize(size, Image.NEAREST if scale >= 1 else Image.LANCZOS)
    draw = ImageDraw.Draw(image)

    def place(points):  # the middle of the first pixel is at 0
        return (values_of(points) - (left, top) + 0.5) * scale
    if panel.grid:
        for x in np.arange(panel.grid * scale, image.width, panel.grid * scale):
            draw.line([(x, 0), (x, image.height)], "white")
        for y in np.arange(panel.grid * scale, image.height, panel.grid * scale):
            draw.line([(0, y), (image.width, y)], "white")
    draw_labels(draw, panel, place)
    if panel.numbers:
        for (row, column), value in np.ndenumerate(values_of(panel.picture)):
            draw.text(place((column, row)), f"{value:.2f}", "white", FONT, anchor="mm",
                      stroke_width=2, stroke_fill="black")
    return image


def draw_plot(panel, width):
    """A square with a Panel's points, from their lowest to their highest x and y."""
    below = 2 * LINE
    image = Image.new("RGB", (width, width + below), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, width - 1, width - 1), outline="black")
    everything = np.concatenate([values_of(points) for points in panel.points.values()])
    low = everything.min(0)
    high = everything.max(0)
    room = width - 6 * RADIUS

    def place(points):  # y upwards, as in a textbook
        share = (values_of(points) - low) / (high - low)
        return 3 * RADIUS + room * np.column_stack([share[:, 0], 1 - share[:, 1]])
    draw_labels(draw, panel, place)
    for number, name in enumerate(panel.axes):
        text = f"{name}: {low[number]:.2g} to {high[number]:.2g}"
        draw.text((width / 2, width + LINE * number), text, "black", FONT, anchor="ma")
    return image


def draw_labels(draw, panel, place):
    """A Panel's points and lines; `place` turns points into pixels of what is drawn on."""
    for number, points in enumerate(panel.points.values()):
        for point in place(points):
            draw_mark(draw, point, number)
    for number, points in enumerate(panel.lines.values(), len(panel.points)):
        corners = [tuple(point) for point in place(points)]
        draw_line(draw, [*corners, *corners[:2]], number)


def draw_mark(draw, point, number):
    """The mark of a label: a disk, a square, a diamond or a triangle with a black rim."""
    color = LABEL_COLORS[number]
    x, y = map(float, point)
    if number == 0:
        draw.circle((x, y), RADIUS, color, "black", 2)
    else:
        corners = [(x + RADIUS * dx, y + RADIUS * dy) for dx, dy in MARKS[number]]
        draw.polygon(corners, color, "black", 2)


def draw_line(draw, points, number):
    """The line of a label, with a black rim."""
    draw.line(points, "black", 7, joint="curve")
    draw.line(points, LABEL_COLORS[number], 3, joint="curve")


# ------------------------------------------------------------------------------ numbers to pictures

def as_image(picture, limits=None):
    """A Pillow image in RGB of any of these:

    a Pillow image; RGB, bytes (H, W, 3) or (3, H, W) or numbers (3, H, W) in [0, 1]; a map (h, w)
    in the colours of MAP_COLORS; or features (C, h, w), as their first three principal components
    in red, green and blue.
    """
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    values = values_of(picture)
    if values.ndim == 2:
        return Image.fromarray(colored(scaled(values, limits)))
    if values.dtype == np.uint8 and values.shape[2] == 3:
        return Image.fromarray(values)
    if len(values) == 3:
        values = values.transpose(1, 2, 0)
        if values.dtype != np.uint8:
            values = to_bytes(values)
        return Image.fromarray(np.ascontiguousarray(values))
    return Image.fromarray(to_bytes(principal_components(values)))


def values_of(values):
    """A tensor or an array as an array."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def to_bytes(values):
    return (255 * values.clip(0, 1)).round().astype(np.uint8)


def scaled(values, limits):
    """Values from 0 to 1 for a map's values from the lower to the upper limit."""
    values = values.astype(float)
    low, high = limits or (np.nanmin(values), np.nanmax(values))
    return ((values - low) / max(high - low, 1e-12)).clip(0, 1)


def colored(shares):
    """Bytes (h, w, 3) in MAP_COLORS of a map (h, w) from 0 to 1; NaN is white."""
    stops = np.linspace(0, 1, len(MAP_COLORS))
    table = np.array([ImageColor.getrgb(color) for color in MAP_COLORS])  # (5, 3)
    channels = [np.interp(shares, stops, channel) for channel in table.T]
    colors = np.stack(channels, axis=2).round()
    colors[np.isnan(shares)] = 255
    return colors.astype(np.uint8)


def laid_over(image, values, limits):
    """An image in grey under a map (h, w), which hides more of it where its values are high."""
    shares = Image.fromarray(np.float32(scaled(values, limits)))
    shares = np.asarray(shares.resize(image.size, Image.BILINEAR)).clip(0, 1)
    opacity = Image.fromarray(to_bytes(0.9 * shares ** 0.7))
    grey = image.convert("L").convert("RGB")
    return Image.composite(Image.fromarray(colored(shares)), grey, opacity)


def principal_components(features):
    """(h, w, 3) in [0, 1]: the three directions in which features (C, h, w) vary most."""
    C, h, w = features.shape
    rows = features.reshape(C, h * w).T
    rows = rows - rows.mean(0)
    U, S, _ = np.linalg.svd(rows, full_matrices=False)
    components = (U * S)[:, :3]
    low, high = np.quantile(components, (0.02, 0.98), axis=0)
    return ((components - low) / np.maximum(high - low, 1e-12)).reshape(h, w, 3)
