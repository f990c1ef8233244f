"""The built-in figures: drawn people in eight styles, with exact labels, so that everything can be
tried without a download. This program stands alone. `data.py` calls it once, and then reads the
files like those of any other data set.

How a figure comes about, in the order of this file:

1. A person is a skeleton in three dimensions. Chance chooses a pose, such as "walk", and an angle
   for each joint within the limits of the pose (`poses.json`). The joints follow from the angles.
2. The skeleton is clothed in *capsules*: cylinders with round ends, which may taper. A thigh is one
   capsule, an eye is a capsule without length, and a skirt is three capsules.
3. The capsules are drawn into two buffers. For each pixel, `part` says which part of the person is
   seen there, and `depth` says how near it is. A capsule overwrites only what is farther away. Such
   a pair is called a *z-buffer*.
4. The buffers tell where the outlines run and how light falls on the surface.
5. A *style* is a set of proportions and a function that paints: a photograph, a cartoon, and so on.
6. `draw_figure` puts all of this together, and `write_figures` draws a whole data set.

Axes: x points to the right, y down, and z towards the camera. A person is about 1 unit high.
Shapes: a picture has 160 x 160 pixels. The buffers have 320 x 320 *fine pixels*; halving them at
the end makes edges smooth. `(pixels,)` counts only the fine pixels where something is seen.
Colors: red, green and blue from 0 to 255, written like "#ff8000".
Chance: all random numbers come from `rng`, in a fixed order, so that the same seed always draws the
same figure. Whoever changes the drawing gives it a new name in `data.py` (`FIGURES`).
"""
import errno
import json
import multiprocessing
import os
import threading
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter
from torch.utils.data import DataLoader

HERE = Path(__file__).parent
SIZE = 160  # height and width of a picture
FINE = 320  # height and width of the buffers

# What is seen at a fine pixel. A limb's number is that of the left one; the right one's is 1 more.
NONE, HEAD, NECK, HAIR, EYE, PUPIL, LIPS, TORSO, SKIRT = range(9)
ARM, FOREARM, HAND, THIGH, SHIN, FOOT, OBJECT, CLUTTER, NIMBUS = range(10, 28, 2)
PARTS = 32  # more than the largest number
LEAD = 31  # between the panes of a window; no part has this number

# What a part is made of. A style has a color for each material.
SKIN, LOCKS, WHITE, BLACK, RED, TOP, BOTTOM, SHOE, THING, BAR = range(1, 11)
MATERIALS = 11

LEFT, RIGHT = 0, 1  # the sides of a person
OUTWARDS = (1, -1)  # the sign of x on each side of a person who faces the camera


@dataclass
class Figure:
    """A picture of one person, with its labels in pixels of the picture."""
    image: np.ndarray  # (160, 160, 3) uint8
    keypoints: np.ndarray  # (17, 3) x, y, v in COCO's order
    # v is 2 if the joint is visible, 1 if it is covered, and 0 outside of the picture (x = y = 0).
    box: tuple  # left, top, width and height of the visible silhouette
    area: int  # number of pixels of the silhouette


@dataclass
class Style:
    """How people of a style look, and how they are painted."""
    paint: Callable  # (scene, rng) -> picture (160, 160, 3)
    poses: str = "stand stand walk walk run sit cheer cheer dance"  # each word is equally likely
    yaw: tuple = (0, 180)  # limits, in degrees, of how far a person turns away from the camera
    head: float = 1.0  # size
    eyes: float = 1.0  # size
    thick: float = 1.0  # thickness of trunk and limbs
    legs: float = 1.0  # length
    arms: float = 1.0  # length
    robe: float = 0.0  # probability of a robe instead of trousers, shorts or a skirt
    clutter: int = 0  # largest number of capsules in the background


# ---- 1. The skeleton -----------------------------------------------------------------------------

# The limits of the angles in each pose, in degrees: {"stand": {"lean": [-5, 8], ...}, ...}.
# lean: the trunk, forwards       stride: one leg forwards, the other one back
# tilt: the pelvis, to a side     hip: a leg, forwards      apart: a leg, sideways
# knee, elbow: how much they bend  arm: an arm, forwards     lift: an arm, sideways
POSES = json.loads((HERE / "poses.json").read_text(encoding="utf-8"))

# Where the keypoints of the face are, from the middle of the head, in units.
NOSE = np.array([0, 18, 68]) / 1000
LEFT_EYE = np.array([26, -4, 50]) / 1000
RIGHT_EYE = np.array([-26, -4, 50]) / 1000
LEFT_EAR = np.array([64, 4, -4]) / 1000
RIGHT_EAR = np.array([-64, 4, -4]) / 1000
FACE = np.array([NOSE, LEFT_EYE, RIGHT_EYE, LEFT_EAR, RIGHT_EAR])


@dataclass
class Body:
    """What chance decides about a person."""
    angles: dict  # name -> (2,) degrees of the left and of the right side
    pelvis: np.ndarray  # (3, 3) rotation
    trunk: np.ndarray  # (3, 3) rotation
    skull: np.ndarray  # (3, 3) rotation
    head: float  # size
    thick: float  # thickness of trunk and limbs
    arms: float  # length
    legs: float  # length
    robe: bool
    skirt: bool
    long_hair: bool

    @property
    def chest(self):
        """The point (3,) between the shoulders; the pelvis is at the origin."""
        return self.trunk @ [0, -0.27, 0]


def rotation(axis, degrees):
    """The matrix (3, 3) that turns points about an axis."""
    number = "xyz".index(axis)
    i = (number + 1) % 3  # the other two axes: i turns towards j
    j = (number + 2) % 3
    cosine = np.cos(np.radians(degrees))
    sine = np.sin(np.radians(degrees))
    matrix = np.eye(3)
    matrix[i, i] = cosine
    matrix[j, j] = cosine
    matrix[i, j] = -sine
    matrix[j, i] = sine
    return matrix


def swing(forwards, sideways):
    """The direction (3,) of a limb that hangs down, swung forwards and then sideways (degrees)."""
    return rotation("z", -sideways) @ rotation("x", forwards) @ [0, 1, 0]


def bend(limb, towards, degrees):
    """The direction (3,) of a lower limb: the upper limb's, turned towards another direction."""
    angle = np.radians(degrees)
    across = towards - (towards @ limb) * limb
    return np.cos(angle) * limb + np.sin(angle) * across / np.linalg.norm(across)


def draw_body(style, rng):
    """A random Body, in one of the style's poses."""
    pose = POSES[rng.choice(style.poses.split())]
    angles = {}
    for name, limits in pose.items():
        angles[name] = rng.uniform(*limits, 2)
    sign = rng.choice([-1, 1])  # which leg swings forwards
    angles["stride"] = angles["stride"][0] * sign * np.array([1, -1])

    yaw = rng.choice([-1, 1]) * rng.uniform(*style.yaw)
    pelvis = rotation("x", rng.uniform(-12, 8))
    pelvis = pelvis @ rotation("z", angles["tilt"][0])
    pelvis = pelvis @ rotation("y", yaw)
    trunk = pelvis @ rotation("x", -angles["lean"][0])
    trunk = trunk @ rotation("y", rng.uniform(-20, 20))
    trunk = trunk @ rotation("z", rng.uniform(-8, 8))
    skull = trunk @ rotation("y", rng.uniform(-40, 40))
    skull = skull @ rotation("x", rng.uniform(-20, 12))

    head, thick, arms, legs = rng.uniform(0.92, 1.1, 4)
    robe, skirt, long_hair = rng.random(3) < (style.robe, 0.2, 0.4)
    return Body(
        angles=angles,
        pelvis=pelvis,
        trunk=trunk,
        skull=skull,
        head=style.head * head,
        thick=style.thick * thick,
        arms=style.arms * arms,
        legs=style.legs * legs,
        robe=robe,
        skirt=skirt,
        long_hair=long_hair)


def arm_points(body, side, rng):
    """Where shoulder, elbow, wrist and fingers are: four points (3,)."""
    outwards = OUTWARDS[side]
    forwards = body.angles["arm"][side] - 0.8 * body.angles["stride"][side]  # against the legs
    upper = swing(forwards, outwards * body.angles["lift"][side])
    towards = rng.uniform((-0.2, -1, 0.4), (0.7, 0.1, 1))  # inwards, up and to the front
    towards[0] *= -outwards
    lower = bend(upper, towards, body.angles["elbow"][side])

    shoulder = body.chest + body.trunk @ [0.1 * outwards, 0, 0]
    elbow = shoulder + 0.165 * body.arms * body.trunk @ upper
    wrist = elbow + 0.145 * body.arms * body.trunk @ lower
    fingers = wrist + 0.055 * body.trunk @ lower
    return shoulder, elbow, wrist, fingers


def leg_points(body, side):
    """Where hip, knee, ankle and toes are: four points (3,)."""
    outwards = OUTWARDS[side]
    forwards = body.angles["hip"][side] + body.angles["stride"][side]
    thigh = swing(forwards, outwards * body.angles["apart"][side])
    backwards = -swing(forwards + 90, 0)
    shin = bend(thigh, backwards, body.angles["knee"][side])
    foot = bend(shin, np.cross(shin, [-1, 0.25 * outwards, 0]), 75)

    hip = body.pelvis @ [0.058 * outwards, 0, 0]
    knee = hip + 0.24 * body.legs * body.pelvis @ thigh
    ankle = knee + 0.235 * body.legs * body.pelvis @ shin
    toes = ankle + 0.085 * body.pelvis @ foot
    return hip, knee, ankle, toes


# ---- 2. The capsules -----------------------------------------------------------------------------

@dataclass
class Capsule:
    """A cylinder with round ends, in units."""
    part: int
    start: np.ndarray  # (3,)
    end: np.ndarray  # (3,)
    start_radius: float
    end_radius: float


@dataclass
class Person:
    """A Body that is clothed, in units. Its pelvis is at the origin."""
    joints: np.ndarray  # (17, 3) in COCO's order
    capsules: list
    robe: bool


def build_person(style, rng):
    """A random Person."""
    body = draw_body(style, rng)
    joints = np.zeros((17, 3))
    capsules = [Capsule(TORSO, body.chest, np.zeros(3), 0.07, 0.07)]
    for side in (LEFT, RIGHT):
        shoulder, elbow, wrist, fingers = arm_points(body, side, rng)
        hip, knee, ankle, toes = leg_points(body, side)
        joints[5 + side::2] = shoulder, elbow, wrist, hip, knee, ankle  # left and right take turns
        capsules += trunk_capsules(body, shoulder, hip)
        capsules += arm_capsules(body, side, shoulder, elbow, wrist, fingers)
        capsules += leg_capsules(body, side, hip, knee, ankle, toes)
        if body.robe:  # it has wide sleeves
            hem = wrist + [0, 0.09, 0]
            capsules.append(Capsule(FOREARM + side, wrist, hem, 0.03, 0.045))
    capsules += cloth_between_legs(body, joints)
    for capsule in capsules:
        capsule.start_radius *= body.thick
        capsule.end_radius *= body.thick

    neck = body.trunk @ [0, -0.30, 0.005]
    chin = body.trunk @ [0, -0.325, 0.015]
    middle = chin + body.head * body.skull @ [0, -0.075, 0.01]  # of the head
    joints[:5] = middle + body.head * FACE @ body.skull.T
    for feature in head_capsules(body, style.eyes):
        feature.start = middle + body.head * body.skull @ feature.start
        feature.end = middle + body.head * body.skull @ feature.end
        feature.start_radius *= body.head
        feature.end_radius *= body.head
        capsules.append(feature)
    capsules.append(Capsule(NECK, neck, middle, 0.03, 0.035))
    return Person(joints, capsules, body.robe)


def trunk_capsules(body, shoulder, hip):
    """One side of the trunk, and the line of its shoulder."""
    below_shoulder = 0.4 * body.chest + 0.6 * shoulder
    return [
        Capsule(TORSO, below_shoulder, hip, 0.062, 0.064),
        Capsule(TORSO, body.chest, shoulder, 0.042, 0.042)]


def arm_capsules(body, side, shoulder, elbow, wrist, fingers):
    """Upper arm, forearm and hand. A robe widens towards the wrist."""
    wide = 1.0
    cuff = 1.0
    if body.robe:
        wide = 1.3
        cuff = 1.7
    return [
        Capsule(ARM + side, shoulder, elbow, 0.042, 0.032 * wide),
        Capsule(FOREARM + side, elbow, wrist, 0.031 * wide, 0.022 * cuff),
        Capsule(HAND + side, wrist, fingers, 0.022, 0.017)]


def leg_capsules(body, side, hip, knee, ankle, toes):
    """Thigh, shin and foot. A robe widens below the hip."""
    flare = 1.0
    if body.robe:
        flare = 1.7
    return [
        Capsule(THIGH + side, hip, knee, 0.06, 0.043 * flare),
        Capsule(SHIN + side, knee, ankle, 0.042 * flare, 0.027 * flare),
        Capsule(FOOT + side, ankle, toes, 0.027, 0.021)]


def cloth_between_legs(body, joints):
    """Three strips of cloth. They end at the knees in a skirt, and at the ankles in a robe."""
    if not body.robe and not body.skirt:
        return []
    left_knee, right_knee, left_ankle, right_ankle = joints[13:]
    capsules = []
    for share in (0.2, 0.5, 0.8):
        at_knees = share * left_knee + (1 - share) * right_knee
        at_ankles = share * left_ankle + (1 - share) * right_ankle
        capsules.append(Capsule(SKIRT, np.zeros(3), at_knees, 0.07, 0.06))
        if body.robe:
            capsules.append(Capsule(SKIRT, at_knees, at_ankles, 0.06, 0.05))
    return capsules


def head_capsules(body, eye_size):
    """A head of size 1 that looks at the camera, with its middle at the origin."""
    hair_end = (0, -0.02, -0.022)
    if body.long_hair:
        hair_end = (0, 0.09, -0.045)
    bridge = NOSE - (0, 0.02, 0.01)  # where the nose begins
    capsules = [
        Capsule(HEAD, (0, 0.026, 0.01), (0, -0.02, -0.002), 0.05, 0.062),
        Capsule(HEAD, bridge, NOSE, 0.009, 0.012),
        Capsule(LIPS, (-0.014, 0.044, 0.052), (0.014, 0.044, 0.052), 0.008, 0.008),
        Capsule(HAIR, (0, -0.035, -0.012), hair_end, 0.06, 0.05),
        ball(EYE, LEFT_EYE, 0.016 * eye_size),
        ball(EYE, RIGHT_EYE, 0.016 * eye_size),
        ball(HEAD, LEFT_EAR, 0.017),
        ball(HEAD, RIGHT_EAR, 0.017)]
    for eye in (LEFT_EYE, RIGHT_EYE):
        pupil = eye + (0, 0.001, 0.006 + 0.005 * eye_size)
        capsules.append(ball(PUPIL, pupil, 0.008 * eye_size))
    return capsules


def ball(part, middle, radius):
    """A capsule without length."""
    return Capsule(part, middle, middle, radius, radius)


def dress(robe, rng):
    """The material of each part (32,)."""
    if robe:
        sleeves = (TOP, TOP)  # materials of upper arm and forearm
        trousers = (TOP, TOP)  # materials of thigh and shin
    else:
        sleeves = [(SKIN, SKIN), (TOP, SKIN), (TOP, TOP)][rng.integers(3)]
        trousers = [(BOTTOM, SKIN), (BOTTOM, BOTTOM)][rng.integers(2)]
    materials = {
        HEAD: SKIN,
        NECK: SKIN,
        HAIR: LOCKS,
        PUPIL: BLACK,
        EYE: WHITE,
        LIPS: RED,
        TORSO: TOP,
        SKIRT: trousers[0],
        ARM: sleeves[0],
        FOREARM: sleeves[1],
        HAND: SKIN,
        THIGH: trousers[0],
        SHIN: trousers[1],
        FOOT: SHOE,
        OBJECT: THING,
        CLUTTER: THING,
        NIMBUS: THING}
    outfit = np.zeros(PARTS, np.uint8)
    for part, material in materials.items():
        outfit[part] = material
        if part >= ARM:
            outfit[part + 1] = material  # the right limb
    outfit[CLUTTER + 1] = BAR  # in place of a right limb: clutter has two materials
    return outfit


# ---- 3. The z-buffer -----------------------------------------------------------------------------

@dataclass
class Scene:
    """What a style has to paint."""
    part: np.ndarray  # (320, 320) what is seen
    depth: np.ndarray  # (320, 320) how near it is, in fine pixels
    joints: np.ndarray  # (17, 3) in fine pixels
    covered: np.ndarray  # (17,) bool, whether something is in front of the joint
    scale: float  # fine pixels per unit
    outfit: np.ndarray  # (32,) material of each part

    @cached_property
    def pixels(self):
        """Where something is seen: (pixels,) indices into the flattened buffers."""
        return np.flatnonzero(self.part != NONE)

    @cached_property
    def material(self):
        """The material that is seen there: (pixels,)."""
        return self.outfit.take(self.part.take(self.pixels))


def compose(style, rng):
    """A Scene with a random person at a random place."""
    person = build_person(style, rng)
    ends = []
    radii = []
    for capsule in person.capsules:
        ends.append((capsule.start, capsule.end))
        radii.append((capsule.start_radius, capsule.end_radius))
    ends = np.array(ends)  # (capsules, 2, 3)
    radii = np.array(radii)  # (capsules, 2)
    low = (ends - radii[..., None]).min((0, 1))
    high = (ends + radii[..., None]).max((0, 1))

    nearness = 1
    if rng.random() < 0.12:
        nearness = rng.uniform(1.1, 1.6)  # so near that the border may cut the person
    size = high - low
    scale = nearness * rng.uniform(0.68, 0.96) * FINE / size[:2].max()
    margin = FINE - scale * size
    shift = rng.uniform(0.1, 0.9, 3) * margin - scale * low
    shift[2] = 0
    joints = person.joints * scale + shift
    ends = ends * scale + shift
    radii = radii * scale

    scene = Scene(
        part=np.zeros((FINE, FINE), np.uint8),
        depth=np.full((FINE, FINE), -1e6, np.float32),
        joints=joints,
        covered=np.zeros(17, bool),
        scale=scale,
        outfit=dress(person.robe, rng))
    add_clutter(scene, rng.integers(style.clutter + 1), rng)
    for capsule, its_ends, its_radii in zip(person.capsules, ends, radii):
        draw_capsule(scene, capsule.part, *its_ends, its_radii)
    if rng.random() < 0.15:
        hide_a_joint(scene, rng)
    scene.covered = find_covered(scene, ends, radii)
    return scene


def draw_capsule(scene, part, start, end, radii):
    """Draws a capsule, in fine pixels, wherever it is nearer than what the buffers hold."""
    ax, ay, az = start.tolist()
    dx, dy, dz = (end - start).tolist()
    ra, rb = radii.tolist()
    left, right = pixel_range(ax, ax + dx, max(ra, rb))
    top, bottom = pixel_range(ay, ay + dy, max(ra, rb))
    x = np.arange(left, right, dtype=np.float32) - ax
    y = np.arange(top, bottom, dtype=np.float32)[:, None] - ay

    # The point of the capsule's axis that is nearest to each pixel: 0 is the start, 1 the end.
    along = (x * dx + y * dy) / (dx * dx + dy * dy + 1e-6)
    along = np.minimum(np.maximum(along, 0), 1)
    # A ball of radius r bulges by √(r² - distance²) from its middle towards the camera.
    radius = ra + (rb - ra) * along
    bulge = radius ** 2 - (x - along * dx) ** 2 - (y - along * dy) ** 2
    depth = az + along * dz + np.sqrt(np.maximum(bulge, 0))

    window = slice(top, bottom), slice(left, right)
    nearer = (bulge > 0) & (depth > scene.depth[window])
    np.copyto(scene.depth[window], depth, where=nearer)
    np.copyto(scene.part[window], np.uint8(part), where=nearer)


def pixel_range(a, b, reach):
    """The first pixel from a to b, `reach` included on both sides, and the one after the last."""
    first = int(min(a, b) - reach)
    last = int(max(a, b) + reach + 1)
    return min(max(first, 0), FINE), min(max(last, 0), FINE)


def add_clutter(scene, count, rng):
    """Draws capsules far behind the person."""
    for _ in range(count):
        start = np.append(rng.uniform(0, FINE, 2), -1e4)
        part = CLUTTER + rng.integers(2)
        end = start + rng.normal(0, (40, 40, 0))
        draw_capsule(scene, part, start, end, rng.uniform(3, 14, 2))


def hide_a_joint(scene, rng):
    """Puts a pole or a bush in front of the person."""
    pole = rng.random() < 0.5
    x, y, _ = rng.choice(scene.joints[5:])
    joint = np.array([x, y, 1e4])
    count = 9
    spread = (12, 12, 0)
    if pole:
        count = 1
        spread = (900, 900, 0)
    for _ in range(count):
        middle = joint + rng.normal(0, (8, 8, 0))
        half = rng.normal(0, spread)
        radii = rng.uniform(0.02, 0.06, 2) * scene.scale
        draw_capsule(scene, OBJECT, middle - half, middle + half, radii)


def find_covered(scene, ends, radii):
    """Whether something is clearly nearer than the joint's own limbs: (17,) bool."""
    distances = np.linalg.norm(scene.joints[:, None, None] - ends, axis=-1)  # (17, capsules, 2)
    own_radius = np.where(distances < 1e-3, radii, 0).max((1, 2))  # of the limbs that end there
    nearest = np.rint(scene.joints[:, :2]).astype(int)
    x, y = nearest.clip(0, FINE - 1).T
    surface = scene.joints[:, 2] + 1.3 * own_radius
    return scene.depth[y, x] > surface + 0.02 * scene.scale


# ---- 4. What the styles share --------------------------------------------------------------------

def light(scene, direction, ambient=0.0):
    """Brightness (pixels,) by Lambert's law: the cosine between the normal and the light."""
    lx, ly, lz = (np.array(direction) / np.linalg.norm(direction)).tolist()
    x = slope(scene, 1)
    y = slope(scene, FINE)
    cosine = (lz - lx * x - ly * y) / np.sqrt(1 + x * x + y * y)
    return ambient + (1 - ambient) * np.maximum(cosine, 0)


def slope(scene, step):
    """How much the depth grows (pixels,): to the right if `step` is 1, downwards if it is FINE."""
    ahead = scene.depth.take(scene.pixels + step, mode="clip")
    behind = scene.depth.take(scene.pixels - step, mode="clip")
    return np.clip((ahead - behind) / 2, -4, 4)


def fold(scene, depth):
    """Lays the clothes in folds of this depth (fine pixels); the light shows them."""
    cloth = scene.pixels[(scene.material == TOP) | (scene.material == BOTTOM)]
    scene.depth.ravel()[cloth] += depth * folds().take(cloth)


@lru_cache
def folds():
    """How deep the folds are at each fine pixel: (320, 320) from -1 to 1."""
    rows, columns = np.ogrid[:FINE, :FINE]
    return np.sin(columns * 0.25 + 2 * np.sin(rows * 0.05))


def find_lines(region, depth, jump, width=1):
    """Where to draw lines: (320, 320) bool.

    A line is `width` fine pixels wide on both sides of an edge. At an edge, the number in `region`
    (320, 320) changes, or the depth (320, 320) jumps by so many fine pixels.
    """
    line = np.zeros((FINE, FINE), bool)
    mark_steps(line, region, depth, jump, width)
    mark_steps(line.T, region.T, depth.T, jump, width)
    return line


def mark_steps(line, region, depth, jump, width):
    """Marks the edges between rows in `line`, the result of `find_lines`."""
    step = region[width:] != region[:-width]
    step |= np.abs(depth[width:] - depth[:-width]) > jump
    line[width:] |= step
    line[:-width] |= step


def outline(scene, region, jump=0.04, width=1):
    """`find_lines` where something is seen: (pixels,), 0 or 1. The depth jumps by so many units."""
    line = find_lines(region, scene.depth, jump * scene.scale, width)
    return line.take(scene.pixels).astype(np.float32)


def layer(scene, values):
    """Values (pixels,) as a picture (160, 160), which is 0 elsewhere."""
    fine = np.zeros((FINE, FINE), np.float32)
    fine.flat[scene.pixels] = values
    return np.asarray(Image.fromarray(fine).reduce(2))


def shaded(scene, table, shade):
    """Colors (pixels, 3): those of the materials, times a brightness (pixels,)."""
    return table.take(scene.material, 0) * shade[:, None]


def stamp(scene, backdrop, colors):
    """Puts colors (pixels, 3) on a fine backdrop: a picture (160, 160, 3)."""
    fine = np.array(backdrop)
    fine.reshape(-1, 3)[scene.pixels] = np.clip(colors, 0, 255)
    return np.asarray(Image.fromarray(fine).reduce(2))


def picture_of(values):
    """An image from values that are clipped to 0 ... 255."""
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def make_backdrop(grid):
    """A fine image of a few blended colors (rows, columns, 3), and a pen to draw on the image."""
    blended = picture_of(grid).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    image = double(blended)
    return image, ImageDraw.Draw(image)


def double(image):
    """A fine image from one of the size of a picture."""
    return image.resize((FINE, FINE), Image.Resampling.NEAREST)


def noise(rng, cells):
    """Smooth random values (160, 160, 1) between -1 and 1, with so many bumps in a row."""
    grid = np.float32(rng.uniform(-1, 1, (cells, cells)))
    smooth = Image.fromarray(grid).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(smooth)[..., None]


def pick(rng, colors):
    """A random one of the colors: (3,)."""
    return np.float32(colors[rng.integers(len(colors))])


def ink(color):
    """A color (3,) in the form that a pen takes."""
    return tuple(color.astype(int))


def rgb(name):
    """A color such as "#ff8000": (3,) integers from 0 to 255."""
    return np.array(ImageColor.getrgb(name))


def palette(names):
    """Several colors such as "#ff8000 #0080ff": (colors, 3)."""
    return np.array([rgb(name) for name in names.split()])


def pigments(rng, skin, colors):
    """A color for each material (11, 3). Those of clothes and things come from `colors`."""
    table = np.zeros((MATERIALS, 3), np.float32)
    table[SKIN] = skin
    table[LOCKS] = rgb("#231914")
    table[WHITE] = rgb("#f5f5f5")
    table[BLACK] = rgb("#140f0f")
    table[RED] = rgb("#aa4646")
    table[TOP:] = rng.permutation(colors)[:5]
    return table


# ---- 5. The styles: each paints a scene as a picture (160, 160, 3) -------------------------------

PALE_SKIN = rgb("#fad4b9")
DARK_SKIN = rgb("#5c3a28")
HAIR_COLORS = palette("#19120f #4b301c #be965a #827d78")  # black, brown, fair, grey


def dull_colors(rng, *shape):
    """Random colors (*shape, 3) that are nearly grey, and a little warm."""
    grey = rng.uniform(45, 215, (*shape, 1))
    return grey + rng.normal(0, 17, (*shape, 3)) + (6, 0, -6)


def photo(scene, rng):
    """A snapshot of a person in a room, by a camera that is never perfect."""
    # Behind the person is a room with some things.
    image, pen = make_backdrop(dull_colors(rng, 3, 3))
    places = rng.uniform(0, FINE, (14, 4))
    colors = dull_colors(rng, rng.integers(14))
    for (x, y, w, h), color in zip(places, colors):
        corners = (x - w / 3, y - h / 4, x + w / 3, y + h / 4)
        if w < 200:
            pen.rectangle(corners, fill=ink(color))
        else:
            pen.ellipse(corners, fill=ink(color))

    # The person wears a plain or a striped shirt.
    tone = rng.random()
    skin = tone * PALE_SKIN + (1 - tone) * DARK_SKIN
    colors = 1.1 * dull_colors(rng, 9) + rng.normal(0, 25, (9, 3))
    table = pigments(rng, skin, colors)
    table[LOCKS] = pick(rng, HAIR_COLORS)
    table[BAR] = table[SKIN]  # some capsules in the background look like arms
    direction = rng.uniform((-1, -1, 0.3), (1, 0.2, 1))
    shade = light(scene, direction, ambient=rng.uniform(0.25, 0.6))
    if rng.random() < 0.5:
        shirt = scene.material == TOP
        y, x = np.divmod(scene.pixels[shirt], FINE)
        stripes = np.sin(x * rng.normal(0, 0.2) + y * rng.normal(0, 0.2))
        shade[shirt] *= 1 + 0.3 * stripes
    picture = stamp(scene, image, shaded(scene, table, shade))
    picture = picture_of(picture * (1 + 0.12 * noise(rng, 40)))

    # The camera has a contrast, a brightness of each channel, a focus, and grain.
    curve = 255 * np.linspace(0, 1, 256) ** rng.uniform(0.7, 1.4)
    curves = curve * rng.uniform(0.85, 1.15, (3, 1))
    picture = picture.point(curves.ravel().astype(int).tolist())
    blur = rng.uniform(-1, 1)
    if blur > 0:
        picture = picture.filter(ImageFilter.BoxBlur(blur))
    grain = rng.random((SIZE, SIZE, 3), np.float32) - 0.5
    return np.asarray(picture) + rng.uniform(3, 35) * grain


# Red, yellow, blue, green, orange, violet.
CARTOON_COLORS = palette("#e63c3c #fac832 #3ca0e6 #50be5a #f08228 #965ac8")
CARTOON_SKIES = palette("#96d7fa #ffe196 #fabec8 #beebc8")  # blue, yellow, pink, green
CARTOON_SKINS = palette("#ffd6aa #ffe150 #965f3c #8cc8f0")  # pale, yellow, brown, blue
CARTOON_HAIR = palette("#281e28 #783c1e #fac83c #dc463c")  # black, brown, blond, red


def cartoon(scene, rng):
    """Bright flat colors in two tones, with outlines, under a sky with sunbeams."""
    sky = pick(rng, CARTOON_SKIES)
    image, pen = make_backdrop([[sky]])
    for angle in np.arange(0, 2 * np.pi, np.pi / 8):  # sunbeams from the middle
        beam = [(160, 160)]
        for a in (angle, angle + 0.2):
            beam.append((160 + 300 * np.cos(a), 160 + 300 * np.sin(a)))
        pen.polygon(beam, fill=ink(0.65 * sky + 90))
    for x in rng.integers(0, FINE, 3):  # hills
        hill = (x - 150, 230 + x // 8, x + 150, 600)
        pen.ellipse(hill, fill=ink(CARTOON_COLORS[rng.integers(6)]))

    table = pigments(rng, pick(rng, CARTOON_SKINS), CARTOON_COLORS)
    table[LOCKS] = pick(rng, CARTOON_HAIR)
    lit = light(scene, (-0.6, -0.7, 0.6)) > 0.35
    shade = np.where(lit, np.float32(1), 0.78)  # two flat tones
    shade *= 1 - outline(scene, scene.outfit.take(scene.part), width=2)
    return stamp(scene, image, shaded(scene, table, shade))


PENCILS = palette("#32323c #6e3c28 #283264")  # graphite, red chalk, blue


def sketch(scene, rng):
    """A drawing in pencil on paper, with hatching and construction lines."""
    rows, columns = np.ogrid[:SIZE, :SIZE]
    lines = layer(scene, outline(scene, scene.outfit.take(scene.part)))
    strength = np.zeros((SIZE, SIZE), np.float32)
    for _ in range(2):  # the hand draws each line twice
        dy = np.rint(3 * noise(rng, 6)[..., 0]).astype(int)
        dx = np.rint(3 * noise(rng, 6)[..., 0]).astype(int)
        shaky = lines[nearest_pixel(rows + dy), nearest_pixel(columns + dx)]
        strength = np.maximum(strength, 1.4 * shaky)

    dark = layer(scene, 1 - light(scene, (-0.7, -0.6, 0.5)))
    hatch = ((columns + rows) % 4 < 1) & (dark > 0.7)
    hatch |= ((columns - rows) % 4 < 1) & (dark > 0.9)
    strength += np.float32(0.5) * hatch
    strength = np.clip(strength, 0, 1)[..., None]
    paper = np.float32(rgb("#f6f0e2")) + 5 * noise(rng, 80)
    image = picture_of(paper + (pick(rng, PENCILS) - paper) * strength)

    pen = ImageDraw.Draw(image)
    joints = rng.choice(scene.joints / 2, 5)
    strokes = rng.normal(0, 40, (5, 2))
    for (x, y, _), (dx, dy) in zip(joints, strokes):  # construction lines
        pen.line((x - dx, y - dy, x + dx, y + dy), fill="#beb6af")
        pen.circle((x, y), abs(dx) / 3, outline="#c8c0b9")
    return image


def nearest_pixel(places):
    """Moves rows or columns that are outside of the picture to its border."""
    return np.clip(places, 0, SIZE - 1)


# Red, ochre, olive, blue, brown, sand, wine.
EARTH_COLORS = palette("#963228 #be8c4b #5f643c #41557d #825537 #d7c39b #6e374b")
OIL_SKINS = palette("#f5c396 #d79b6e #966446")


@lru_cache
def brush_strokes():
    """The way from each pixel to the middle of the stroke that covers it: (2, 160, 160) in y and x.

    All paintings have the same strokes; each painting shifts them.
    """
    rng = np.random.default_rng(0)
    middles = rng.uniform(0, SIZE, (9000, 2))
    angles = rng.normal(0.8, 0.6, 9000)
    image = Image.new("I", (SIZE, SIZE))
    pen = ImageDraw.Draw(image)
    for number, ((y, x), angle) in enumerate(zip(middles, angles)):
        dy = 2.5 * np.sin(angle)
        dx = 2.5 * np.cos(angle)
        pen.line((x - dx, y - dy, x + dx, y + dy), fill=number, width=2)
    stroke = np.asarray(image)
    offsets = middles[stroke].transpose(2, 0, 1) - np.mgrid[:SIZE, :SIZE]
    return np.rint(offsets).astype(int) * (stroke > 0)


def oil_painting(scene, rng):
    """Earth colors in strokes of a brush, lit from one side."""
    ground = pick(rng, EARTH_COLORS)
    image, _ = make_backdrop(ground * rng.uniform(0.15, 0.5, (5, 5, 1)))
    table = pigments(rng, pick(rng, OIL_SKINS), EARTH_COLORS)
    fold(scene, 1.5)
    from_side = rng.choice([-1, 1])
    shade = 0.3 + 1.1 * light(scene, (from_side, -0.7, 0.6)) ** 2
    picture = stamp(scene, image, shaded(scene, table, shade))

    # Each stroke has the color that the picture has at the middle of the stroke.
    dy, dx = np.roll(brush_strokes(), rng.integers(0, SIZE, 2), (1, 2))
    rows, columns = np.ogrid[:SIZE, :SIZE]
    rows = nearest_pixel(rows + dy)
    columns = nearest_pixel(columns + dx)
    ridges = 0.05 * np.sin(rows * 13 + columns * 78)[..., None].astype(np.float32)
    return picture[rows, columns] * (1 + ridges) * np.float32((1.05, 1, 0.85)) + 8


# Marble, bronze, clay, granite, old copper.
STONES = palette("#f0ece2 #8c693c #c87d5a #a5a7a5 #5f8c78")


def sculpture(scene, rng):
    """A figure of one stone on a plinth, before a museum's wall."""
    stone = pick(rng, STONES)
    wall = rng.uniform(50, 190) * rng.uniform(0.85, 1, 3)
    image, pen = make_backdrop(wall * rng.uniform(0.8, 1.2, (3, 3, 1)))
    for x in range(rng.integers(60), FINE, rng.integers(60, 120)):  # a museum's niches
        pen.rounded_rectangle((x, 40, x + 36, 400), 18, fill=ink(0.8 * wall))
    x, y, _ = scene.joints[scene.joints[:, 1].argmax()]  # the lowest joint stands on a plinth
    plinth = (x - 70, y + 6, x + 70, 2 * FINE)
    slab = (x - 82, y + 2, x + 82, y + 16)
    pen.rectangle(plinth, fill=ink(0.7 * stone))
    pen.rectangle(slab, fill=ink(0.85 * stone))

    fold(scene, 1.5)
    from_side = rng.choice([-0.8, 0.8])
    shade = light(scene, (from_side, -0.8, 0.6), ambient=0.2)
    gloss = rng.uniform(0, 0.6) * shade ** 9
    crevices = 0.25 * outline(scene, scene.part)
    shade += gloss - crevices
    picture = stamp(scene, image, stone * shade[:, None])
    return picture * (1 + 0.08 * noise(rng, 30) + 0.08 * noise(rng, 80))


DUSK = rgb("#b95a14")
GLOW = rgb("#ffeb96")
# Red, green, brown, yellow, blue, purple.
LEATHERS = palette("#82190f #23501e #46280f #965a0a #1e283c #5a143c")
PUPPET_SKINS = palette("#965014 #3c1e0c")


def shadow_play(scene, rng):
    """A puppet of leather on a lit screen."""
    border = [DUSK, DUSK, DUSK]
    image, pen = make_backdrop([border, [DUSK, GLOW, DUSK], border])
    for x, y, _ in scene.joints[9:11]:  # rods move the wrists
        hand = x + rng.uniform(-60, 60)
        pen.line((x, y, hand, FINE), fill="#32190a", width=3)
    table = pigments(rng, pick(rng, PUPPET_SKINS), LEATHERS)
    if rng.random() < 0.4:
        table[:] = rgb("#160c06")  # a plain black puppet

    # Light shines through the cuts between parts, and through a pattern of holes.
    x = scene.pixels % FINE
    y = scene.pixels // FINE
    size = rng.uniform(0.4, 0.7)
    pattern = np.sin(size * (x + y)) * np.sin(size * (x - y)) > 0.5
    holes = pattern & (scene.material == TOP)
    cut = 0.8 * np.maximum(outline(scene, scene.part, jump=np.inf), holes)[:, None]
    colors = table[scene.material] * (1 - cut) + np.float32(rgb("#ffc864")) * cut
    image = picture_of(stamp(scene, image, colors) * (1 + 0.05 * noise(rng, 60)))

    pen = ImageDraw.Draw(image)
    rivets = scene.joints[5:][~scene.covered[5:]] / 2
    for x, y, _ in rivets:
        pen.circle((x, y), 1.5, fill="#ffd778", outline="#281405")
    return image.filter(ImageFilter.BoxBlur(rng.uniform(0.2, 1)))


# White, blue, red, green, grey, yellow.
SILKS = palette("#e4ded0 #96a5af #cd826e #7d967d #6e6e73 #d7c396")
SEAL = [(2, 3), (9, 3), (3, 8), (9, 8)]  # the corners of a stroke on the seal, in pixels


def ink_painting(scene, rng):
    """Thin color and brush lines on paper, before misty mountains."""
    fibres = 1 + 0.03 * noise(rng, 5) + 0.03 * noise(rng, 70)
    paper = np.float32(rgb("#eee4cd")) * fibres
    columns = np.arange(SIZE)
    for height in rng.uniform(20, 110, 3):  # mountains, which fade downwards
        bumps = rng.uniform(-25, 25, 8)
        ridge = height + np.interp(columns, np.linspace(0, SIZE, 8), bumps)
        below = np.float32(np.arange(SIZE)[:, None] - ridge)[..., None]
        paper -= 60 * np.exp(-np.maximum(below, 0) / 14) * (below > 0)

    # The color is wet, and thinner here and there.
    shade = 0.7 + 0.35 * light(scene, (0.3, -0.6, 0.7))
    table = pigments(rng, rgb("#f0dcc3"), SILKS)
    wash = stamp(scene, double(picture_of(paper)), shaded(scene, table, shade))
    picture = paper + (wash - paper) * np.clip(0.8 + 0.5 * noise(rng, 8), 0, 1)

    # The lines are thick and thin.
    line = 255 * outline(scene, scene.outfit.take(scene.part), width=2)
    line = picture_of(layer(scene, line)).filter(ImageFilter.BoxBlur(1))
    line = np.asarray(line)[..., None] / np.float32(255)
    strength = np.clip(line * (1.6 + 1.8 * noise(rng, 12)), 0, 1)
    image = picture_of(picture + (20 - picture) * strength)

    # The seal stands in one of the corners.
    pen = ImageDraw.Draw(image)
    x, y = rng.choice([6, 142], 2).tolist()
    pen.rectangle((x, y, x + 11, y + 11), fill="#be281e")
    pen.line([(x + dx, y + dy) for dx, dy in SEAL], fill="#f0dcc8")
    return image


# Red, blue, green, yellow, violet, orange.
JEWELS = palette("#d21e2d #2350c8 #19965a #f0b428 #7d32a0 #eb6e23")
PANES = 80


@lru_cache
def panes():
    """The number of the pane at each fine pixel: (320, 320).

    A pane holds the pixels that are nearest to one of 80 random points, around the borders too.
    All windows have the same panes; each window shifts them.
    """
    points = np.random.default_rng(0).uniform(0, FINE, (PANES, 2, 1))
    apart = np.abs(points - np.arange(FINE))
    squares = np.minimum(apart, FINE - apart) ** 2  # (80, 2, 320)
    to_rows = squares[:, 0, :, None]
    to_columns = squares[:, 1, None, :]
    return (to_rows + to_columns).argmin(0).astype(np.uint16)


def stained_glass(scene, rng):
    """A saint in a window of colored panes, with lead between them."""
    table = pigments(rng, rgb("#f5d2a5"), JEWELS)
    table[LOCKS] = rgb("#6e3c19")
    table[THING] = rgb("#f5cd46")
    table[NONE] = 0.6 * pick(rng, JEWELS[:3])

    # A saint has a nimbus, and a face of a single pane.
    x, y, _ = scene.joints[0]
    rows, columns = np.ogrid[:FINE, :FINE]
    nimbus = (columns - x) ** 2 + (rows - y) ** 2 < (0.19 * scene.scale) ** 2
    scene.part[nimbus & (scene.part == NONE)] = NIMBUS
    cells = np.roll(panes(), rng.integers(0, FINE, 2), (0, 1))
    cells = cells * (scene.part != HEAD)

    # Each part has its own tint in each pane, and `piece` is the number of part and pane.
    tints = table[scene.outfit][:, None] * rng.uniform(0.7, 1.3, (PANES, 1))  # (32, 80, 3)
    tints[LEAD] = 25
    tints = tints.reshape(-1, 3).clip(0, 255).astype(np.uint8)
    piece = scene.part * np.uint16(PANES) + cells
    piece[find_lines(piece, scene.depth, jump=np.inf)] = LEAD * PANES
    window = Image.fromarray(tints.take(piece, 0))
    picture = np.asarray(window.reduce(2))
    return picture * (1 + 0.2 * noise(rng, 4) + 0.08 * noise(rng, 70)) + 10


STYLES = {
    "photo": Style(photo, yaw=(0, 110), clutter=5),
    "cartoon": Style(
        cartoon,
        yaw=(0, 60), head=2.1, eyes=1.5, thick=1.1, legs=0.65, arms=0.85),
    "sketch": Style(sketch, thick=0.9, legs=1.1, arms=1.05),
    "oil painting": Style(
        oil_painting, "stand walk sit sit dance bend cheer",
        yaw=(0, 120), thick=1.1, robe=0.6),
    "sculpture": Style(
        sculpture, "stand stand dance sit squat cheer bend run",
        yaw=(0, 130), thick=1.1, robe=0.4),
    "shadow play": Style(
        shadow_play, "stand walk walk run dance dance cheer sit bend",
        yaw=(60, 105), head=1.5, eyes=1.3, robe=0.4),
    "ink painting": Style(
        ink_painting, "stand stand walk sit dance squat bend cheer",
        yaw=(10, 110), robe=0.85),
    "stained glass": Style(
        stained_glass, "stand stand stand walk sit cheer dance",
        yaw=(0, 30), head=1.25, eyes=1.3, robe=0.7)}


# ---- 6. Figures, and a data set of them ----------------------------------------------------------

def draw_figure(style: str, rng: np.random.Generator) -> Figure:
    """Draws one random person in a style of STYLES.

    The same state of the generator gives the same figure. Raises KeyError for an unknown style.
    """
    scene = compose(STYLES[style], rng)
    silhouette = (scene.part != NONE) & (scene.part < OBJECT)
    silhouette = Image.fromarray(silhouette * np.uint8(255)).reduce(2)
    silhouette = silhouette.point([0] * 128 + [1] * 128)  # at least half of the pixel
    left, top, right, bottom = silhouette.getbbox()

    places = (scene.joints[:, :2] - 0.5) / 2  # the middle of pixel x is at fine pixel 2x + 0.5
    keypoints = np.column_stack([places, 2 - scene.covered])
    outside = ((places < 0) | (places > SIZE - 1)).any(1)
    keypoints[outside] = 0

    box = (left, top, right - left, bottom - top)
    area = int(np.asarray(silhouette).sum())
    image = picture_of(STYLES[style].paint(scene, rng))
    return Figure(np.asarray(image), keypoints, box, area)


FIGURE_COUNTS = {"train": (2500, 500), "val": (300, 100)}  # of photos, and of each other style
ANNOTATIONS = {"train": "training_figures.json", "val": "validation_figures.json"}


@dataclass
class Job:
    """One figure to draw."""
    image_id: int
    style: str
    seed: tuple
    folder: Path  # of the data set
    file_name: str  # within the folder


def write_figures(folder, counts, progress):
    """Draws the data set into a folder, in Human-Art's format: images/STYLE/SPLIT_NUMBER.jpg and a
    file of annotations for each split.

    counts: {split: (number of photos, number of figures in each other style)}, as FIGURE_COUNTS
    progress: passes on the parts of a split, given them and a text, and reports how far it is
    """
    for split_number, split in enumerate(counts):
        jobs = list_jobs(folder, split_number, split, *counts[split])
        drawn = DataLoader(
            jobs, batch_size=50, num_workers=os.cpu_count(), collate_fn=draw_some,
            worker_init_fn=end_with_parent)
        images = []
        people = []
        others = multiprocessing.active_children()
        try:
            for part in progress(drawn, f"drawing {split} figures, parts of 50"):
                for image, person in part:
                    images.append(image)
                    people.append(person)
        except BaseException:  # such as Ctrl-C
            end_children(others)  # so that nobody draws into a folder that is removed now
            raise
        lost = [image["file_name"] for image in images
                if not (Path(folder) / image["file_name"]).exists()]
        if lost:
            raise FileNotFoundError(errno.ENOENT, f"{lost[0]} was removed while others were drawn")
        categories = [coco_category()]
        content = {"images": images, "annotations": people, "categories": categories}
        path = Path(folder) / "annotations" / ANNOTATIONS[split]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")


def end_with_parent(worker):
    """A process that draws ends with the program that has started it, however that ends.

    A DataLoader's processes look for that, too, but not while they wait until their results are
    read.
    """
    parent = multiprocessing.parent_process()

    def wait():
        parent.join()
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()


def end_children(others):
    """Ends the processes that this one has started, but for the others."""
    for child in multiprocessing.active_children():
        if child not in others:
            child.kill()
            child.join()


def list_jobs(folder, split_number, split, photos, others):
    """All figures of a split."""
    jobs = []
    for style_number, style in enumerate(STYLES):
        count = photos if style == "photo" else others
        for number in range(count):
            jobs.append(Job(
                image_id=len(jobs) + 1,
                style=style,
                seed=(0, split_number, style_number, number),
                folder=Path(folder),
                file_name=f"images/{style.replace(' ', '_')}/{split}_{number:05d}.jpg"))
    return jobs


def draw_some(jobs):
    """Draws and saves figures. Gives an image and a person, as COCO describes them, for each."""
    found = []
    for job in jobs:
        figure = draw_figure(job.style, np.random.default_rng(job.seed))
        file = job.folder / job.file_name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(figure.image).save(file, quality=92)
        found.append((coco_image(job, figure), coco_person(job, figure)))
    return found


def coco_image(job, figure):
    height, width = figure.image.shape[:2]
    return {
        "file_name": job.file_name,
        "width": width,
        "height": height,
        "category": job.style,
        "description": f"a {job.style} of a person",
        "id": job.image_id}


def coco_person(job, figure):
    return {
        "category_id": 1,
        "iscrowd": 0,
        "keypoints": np.round(figure.keypoints, 2).ravel().tolist(),
        "num_keypoints": int((figure.keypoints[:, 2] > 0).sum()),
        "id": job.image_id,
        "image_id": job.image_id,
        "bbox": [round(float(value), 2) for value in figure.box],
        "area": figure.area}


def coco_category():
    """The category of a person. COCO's skeletons count the joints from 1."""
    skeletons = json.loads((HERE / "skeletons.json").read_text(encoding="utf-8"))
    names = skeletons["COCO17"]["names"]
    bones = [[a + 1, b + 1] for a, b in skeletons["COCO17"]["edges"]]
    return {"id": 1, "name": "person", "keypoints": names, "skeleton": bones}
