"""The built-in figures: drawn people in eight styles, with exact labels, so that everything can be
tried without a download. This program stands alone; `data.py` calls it once and then reads the
files like those of any other data set.

How a figure comes about, in the order of this file:

1. The person is a skeleton in three dimensions. Chance chooses a pose, such as "walk", and an angle
   for each joint within the limits of the pose (`poses.json`); the bones follow from the angles.
2. The skeleton is clothed in *capsules*: rods with round ends, which may taper. A thigh is a
   capsule, a nose is a very short one, a skirt is six of them.
3. The capsules are drawn into two buffers. For each pixel, `part` says which part of the person is
   seen there, and `depth` how near it is; a capsule overwrites only what is farther away than
   itself. This is a *z-buffer*. From it we know which joints are covered, where the outlines run,
   and how light falls on the surface.
4. A *style* is a set of proportions and a function that paints the buffers: as a photograph, a
   cartoon, a sketch, and so on.
5. `write_figures` draws a whole data set, in the format of Human-Art.

Axes: x points to the right, y down, and z towards the camera; a person is about 1 unit high.
Shapes: a picture has 160 x 160 pixels. The buffers have 320 x 320 *fine pixels*, which are halved
at the end for smooth edges. "(pixels,)" are only those fine pixels where something is seen.
Every random number comes from `rng`, in a fixed order: the same seed draws the same figure.
"""
import json
import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from torch.utils.data import DataLoader

HERE = Path(__file__).parent
SIZE = 160  # height and width of a picture
FINE = 320  # height and width of the buffers

# What is seen at a fine pixel. Limbs have two numbers: the left one's, and the right one's after it.
NONE, HEAD, NECK, HAIR, EYE, PUPIL, LIPS, TORSO, SKIRT = range(9)
ARM, FOREARM, HAND, THIGH, SHIN, FOOT, OBJECT, CLUTTER = range(10, 26, 2)
PARTS = 32  # more than the largest number

# What a part is made of. A style has a color for each material.
SKIN, LOCKS, WHITE, BLACK, RED, TOP, BOTTOM, SHOE, THING, BAR = range(1, 11)
MATERIALS = 11

LEFT, RIGHT = 0, 1  # the side of the person, who faces the camera at first
LEFTWARDS = (1, -1)  # the direction of x that points away from the middle, for each side


@dataclass
class Figure:
    """A picture of one person, with its labels in pixels of the picture."""
    image: np.ndarray  # (160, 160, 3) uint8
    keypoints: np.ndarray  # (17, 3): x, y, v in COCO's order
    # v is 2 where the joint is visible, 1 where it is covered, and 0 outside, where x = y = 0.
    box: tuple  # left, top, width and height of the visible silhouette
    area: int  # number of pixels of the silhouette


@dataclass
class Style:
    """How people of a style look, and how they are painted."""
    paint: Callable  # (scene, rng) -> picture (160, 160, 3)
    poses: str = "stand stand walk walk run sit cheer cheer dance"  # twice as often if named twice
    yaw: tuple = (0, 180)  # from and to: degrees that a person turns away, to either side
    head: float = 1.0  # size
    eyes: float = 1.0  # size
    thick: float = 1.0  # thickness of trunk and limbs
    legs: float = 1.0  # length
    arms: float = 1.0  # length
    robe: float = 0.0  # probability of a robe instead of trousers, shorts or a skirt
    clutter: int = 0  # most rods in the background


# ---- 1. The skeleton ----------------------------------------------------------------------------

# For each pose the limits of its angles in degrees, such as {"lean": [-5, 8], "hip": [-4, 6], ...}.
# The trunk leans forwards. Arms and hips swing forwards, arms are lifted sideways, legs are apart.
# Strides swing one leg forwards and the other one back. The pelvis tilts to a side.
POSES = json.loads((HERE / "poses.json").read_text(encoding="utf-8"))

# Nose, left and right eye, left and right ear, seen from the middle of the head.
FACE = np.array([(0, 18, 68), (26, -4, 50), (-26, -4, 50), (64, 4, -4), (-64, 4, -4)]) / 1000


@dataclass
class Body:
    """What chance decides about a person. Pairs are of the left and the right side."""
    angles: dict  # name of an angle -> (2,) degrees
    pelvis: np.ndarray  # (3, 3) rotation, as the next two
    trunk: np.ndarray
    skull: np.ndarray
    head: float  # size
    thick: float  # thickness of trunk and limbs
    arms: float  # length
    legs: float  # length
    robe: bool
    skirt: bool
    long_hair: bool

    @property
    def chest(self):
        """Where the shoulders meet; the pelvis is at the origin."""
        return self.trunk @ [0, -0.27, 0]


def rotation(axis, degrees):
    """The matrix (3, 3) that turns points about an axis."""
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
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
    """The direction (3,) of a lower limb: that of the upper limb, turned towards another one."""
    angle = np.radians(degrees)
    across = towards - (towards @ limb) * limb
    return np.cos(angle) * limb + np.sin(angle) * across / np.linalg.norm(across)


def draw_body(style, rng):
    """A random Body, in one of the style's poses."""
    pose = POSES[rng.choice(style.poses.split())]
    angles = {}
    for name, limits in pose.items():
        angles[name] = rng.uniform(*limits, 2)
    foremost = rng.choice([-1, 1])  # 1 if the left leg goes in front
    angles["stride"] = angles["stride"][0] * foremost * np.array([1, -1])

    yaw = rng.choice([-1, 1]) * rng.uniform(*style.yaw)
    pelvis = rotation("x", rng.uniform(-12, 8))
    pelvis = pelvis @ rotation("z", angles["tilt"][0]) @ rotation("y", yaw)
    trunk = pelvis @ rotation("x", -angles["lean"][0])
    trunk = trunk @ rotation("y", rng.uniform(-20, 20)) @ rotation("z", rng.uniform(-8, 8))
    skull = trunk @ rotation("y", rng.uniform(-40, 40)) @ rotation("x", rng.uniform(-20, 12))

    head, thick, arms, legs = rng.uniform(0.92, 1.1, 4)
    robe, skirt, long_hair = rng.random(3) < (style.robe, 0.2, 0.4)
    return Body(
        angles, pelvis, trunk, skull,
        head=style.head * head,
        thick=style.thick * thick,
        arms=style.arms * arms,
        legs=style.legs * legs,
        robe=robe, skirt=skirt, long_hair=long_hair)


def arm_points(body, side, rng):
    """Where shoulder, elbow, wrist and fingers are: four points (3,)."""
    left = LEFTWARDS[side]
    forwards = body.angles["arm"][side] - 0.8 * body.angles["stride"][side]  # against the legs
    upper = swing(forwards, left * body.angles["lift"][side])
    towards = rng.uniform((-0.2, -1, 0.4), (0.7, 0.1, 1)) * (-left, 1, 1)
    lower = bend(upper, towards, body.angles["elbow"][side])

    shoulder = body.chest + body.trunk @ [0.1 * left, 0, 0]
    elbow = shoulder + 0.165 * body.arms * body.trunk @ upper
    wrist = elbow + 0.145 * body.arms * body.trunk @ lower
    fingers = wrist + 0.055 * body.trunk @ lower
    return shoulder, elbow, wrist, fingers


def leg_points(body, side):
    """Where hip, knee, ankle and toes are: four points (3,)."""
    left = LEFTWARDS[side]
    forwards = body.angles["hip"][side] + body.angles["stride"][side]
    thigh = swing(forwards, left * body.angles["apart"][side])
    backwards = -swing(forwards + 90, 0)
    shin = bend(thigh, backwards, body.angles["knee"][side])
    foot = bend(shin, np.cross(shin, [-1, 0.25 * left, 0]), 75)

    hip = body.pelvis @ [0.058 * left, 0, 0]
    knee = hip + 0.24 * body.legs * body.pelvis @ thigh
    ankle = knee + 0.235 * body.legs * body.pelvis @ shin
    toes = ankle + 0.085 * body.pelvis @ foot
    return hip, knee, ankle, toes


# ---- 2. The capsules ----------------------------------------------------------------------------

@dataclass
class Capsule:
    """A rod with round ends, in units of the person."""
    part: int
    start: np.ndarray  # (3,)
    end: np.ndarray  # (3,)
    start_radius: float
    end_radius: float


@dataclass
class Person:
    joints: np.ndarray  # (17, 3) in COCO's order
    capsules: list
    robe: bool


def build_person(style, rng):
    """A random Person, whose pelvis is at the origin."""
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
            capsules.append(Capsule(FOREARM + side, wrist, wrist + [0, 0.09, 0], 0.03, 0.045))
    capsules += cloth_between_legs(body, joints)
    for capsule in capsules:
        capsule.start_radius *= body.thick
        capsule.end_radius *= body.thick

    neck = body.trunk @ [0, -0.325, 0.015]
    middle = neck + body.head * body.skull @ [0, -0.075, 0.01]  # of the head
    joints[:5] = middle + body.head * FACE @ body.skull.T
    for feature in head_capsules(body, style.eyes):
        feature.start = middle + body.head * body.skull @ feature.start
        feature.end = middle + body.head * body.skull @ feature.end
        feature.start_radius *= body.head
        feature.end_radius *= body.head
        capsules.append(feature)
    capsules.append(Capsule(NECK, body.trunk @ [0, -0.30, 0.005], middle, 0.03, 0.035))
    return Person(joints, capsules, body.robe)


def trunk_capsules(body, shoulder, hip):
    """One half of the trunk, and the line of that shoulder."""
    below_shoulder = 0.4 * body.chest + 0.6 * shoulder
    return [
        Capsule(TORSO, below_shoulder, hip, 0.062, 0.064),
        Capsule(TORSO, body.chest, shoulder, 0.042, 0.042)]


def arm_capsules(body, side, shoulder, elbow, wrist, fingers):
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
    flare = 1.0
    if body.robe:
        flare = 1.7
    return [
        Capsule(THIGH + side, hip, knee, 0.06, 0.043 * flare),
        Capsule(SHIN + side, knee, ankle, 0.042 * flare, 0.027 * flare),
        Capsule(FOOT + side, ankle, toes, 0.027, 0.021)]


def cloth_between_legs(body, joints):
    """Three strips of cloth: a skirt's end at the knees, a robe's at the ankles."""
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
    """A head of size 1 that looks at the camera, seen from its middle."""
    nose, *eyes = FACE[:3]
    ears = FACE[3:]
    hair_end = np.array((0, -0.02, -0.022))
    if body.long_hair:
        hair_end = np.array((0, 0.09, -0.045))
    capsules = [
        Capsule(HEAD, np.array((0, 0.026, 0.01)), np.array((0, -0.02, -0.002)), 0.05, 0.062),
        Capsule(HEAD, nose - (0, 0.02, 0.01), nose, 0.009, 0.012),
        Capsule(LIPS, np.array((-0.014, 0.044, 0.052)), np.array((0.014, 0.044, 0.052)), 0.008, 0.008),
        Capsule(HAIR, np.array((0, -0.035, -0.012)), hair_end, 0.06, 0.05)]
    for eye in eyes:
        capsules.append(ball(EYE, eye, 0.016 * eye_size))
    for ear in ears:
        capsules.append(ball(HEAD, ear, 0.017))
    for eye in eyes:
        pupil = eye + (0, 0.001, 0.006 + 0.005 * eye_size)
        capsules.append(ball(PUPIL, pupil, 0.008 * eye_size))
    return capsules


def ball(part, middle, radius):
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
        CLUTTER: THING}
    outfit = np.zeros(PARTS, np.uint8)
    for part, material in materials.items():
        outfit[part] = material
        if part >= ARM:
            outfit[part + 1] = material  # the right limb
    outfit[CLUTTER + 1] = BAR
    return outfit


# ---- 3. The z-buffer ----------------------------------------------------------------------------

@dataclass
class Scene:
    """A person in the picture: what the painters see."""
    part: np.ndarray  # (320, 320) what is seen
    depth: np.ndarray  # (320, 320) how near it is, in fine pixels
    joints: np.ndarray  # (17, 3) in fine pixels
    covered: np.ndarray  # (17,) bool, whether something is in front of the joint
    scale: float  # fine pixels per unit
    outfit: np.ndarray  # (32,) material of each part

    @cached_property
    def pixels(self):
        """Where something is seen: (pixels,) indices into the flattened buffers."""
        return np.flatnonzero(self.part)

    @cached_property
    def material(self):
        """What is seen there is made of this: (pixels,)."""
        return self.outfit[self.part.flat[self.pixels]]


def compose(style, rng):
    """A Scene with a random person at a random place."""
    person = build_person(style, rng)
    ends = np.array([(rod.start, rod.end) for rod in person.capsules])  # (capsules, 2, 3)
    radii = np.array([(rod.start_radius, rod.end_radius) for rod in person.capsules])
    low = (ends - radii[..., None]).min((0, 1))
    high = (ends + radii[..., None]).max((0, 1))

    nearness = 1
    if rng.random() < 0.12:
        nearness = rng.uniform(1.1, 1.6)  # so near that the border may cut the person
    scale = nearness * rng.uniform(0.68, 0.96) * FINE / (high - low)[:2].max()
    margin = FINE - scale * (high - low)
    shift = rng.uniform(0.1, 0.9, 3) * margin - scale * low
    shift[2] = 0
    joints = joints_in_pixels = person.joints * scale + shift
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
    """Adds a capsule (fine pixels) to the buffers, wherever it is nearer than what is there."""
    ax, ay, az = start.tolist()
    dx, dy, dz = (end - start).tolist()
    ra, rb = radii.tolist()
    left, right = pixel_range(ax, ax + dx, max(ra, rb))
    top, bottom = pixel_range(ay, ay + dy, max(ra, rb))
    x = np.arange(left, right, dtype=np.float32) - ax
    y = np.arange(top, bottom, dtype=np.float32)[:, None] - ay

    # The nearest point of the axis in the picture: 0 is at the start, 1 at the end.
    along = (x * dx + y * dy) / (dx * dx + dy * dy + 1e-6)
    along = np.minimum(np.maximum(along, 0), 1)
    # The surface bulges out of the picture by √(r² - distance²).
    radius = ra + (rb - ra) * along
    bulge = radius ** 2 - (x - along * dx) ** 2 - (y - along * dy) ** 2
    depth = az + along * dz + np.sqrt(np.maximum(bulge, 0))

    window = slice(top, bottom), slice(left, right)
    nearer = (bulge > 0) & (depth > scene.depth[window])
    np.copyto(scene.depth[window], depth, where=nearer)
    np.copyto(scene.part[window], np.uint8(part), where=nearer)


def pixel_range(a, b, reach):
    """The first pixel, and the one after the last, that is at most `reach` away from a to b."""
    first = int(min(a, b) - reach)
    last = int(max(a, b) + reach + 1)
    return min(max(first, 0), FINE), min(max(last, 0), FINE)


def add_clutter(scene, count, rng):
    """Draws rods far behind the person."""
    for _ in range(count):
        start = np.append(rng.uniform(0, FINE, 2), -1e4)
        part = CLUTTER + rng.integers(2)
        end = start + rng.normal(0, (40, 40, 0))
        draw_capsule(scene, part, start, end, rng.uniform(3, 14, 2))


def hide_a_joint(scene, rng):
    """Puts a pole or a bush in front of the person."""
    pole = rng.random() < 0.5
    joint = rng.choice(scene.joints[5:])
    joint[2] = 1e4
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
    """Whether what is seen at a joint is clearly nearer than the surface of its own limbs (17,)."""
    distances = np.linalg.norm(scene.joints[:, None, None] - ends, axis=-1)  # (17, capsules, 2)
    own_radius = np.where(distances < 1e-3, radii, 0).max((1, 2))
    x, y = np.clip(np.rint(scene.joints[:, :2]), 0, FINE - 1).astype(int).T
    return scene.depth[y, x] > scene.joints[:, 2] + 1.3 * own_radius + 0.02 * scene.scale


# ---- 4. What the styles share -------------------------------------------------------------------

def light(scene, direction, ambient=0.0):
    """Brightness (pixels,) by Lambert's law: the cosine between the surface's normal and light."""
    lx, ly, lz = (np.array(direction) / np.linalg.norm(direction)).tolist()
    x = slope(scene, 1)
    y = slope(scene, FINE)
    cosine = (lz - lx * x - ly * y) / np.sqrt(1 + x * x + y * y)
    return ambient + (1 - ambient) * np.maximum(cosine, 0)


def slope(scene, step):
    """Growth (pixels,) of the depth per fine pixel: to the right for step 1, down for FINE."""
    ahead = scene.depth.take(scene.pixels + step, mode="clip")
    behind = scene.depth.take(scene.pixels - step, mode="clip")
    return np.clip((ahead - behind) / 2, -4, 4)


def fold(scene, depth):
    """Lays the clothes in folds, so many fine pixels deep, for the light to fall on."""
    cloth = scene.pixels[(scene.material == TOP) | (scene.material == BOTTOM)]
    x = cloth % FINE
    y = cloth // FINE
    scene.depth.flat[cloth] += depth * np.sin(x * 0.25 + 2 * np.sin(y * 0.05))


def edges(region, depth, jump, width=1):
    """Where the region (320, 320) changes or the depth jumps: (320, 320) bool.

    An edge is marked on both sides, as many fine pixels wide on each.
    """
    line = np.zeros((FINE, FINE), bool)
    for line_, region_, depth_ in ((line, region, depth), (line.T, region.T, depth.T)):
        changes = region_[width:] != region_[:-width]
        changes |= np.abs(depth_[width:] - depth_[:-width]) > jump
        line_[width:] |= changes
        line_[:-width] |= changes
    return line


def outline(scene, region, jump=0.04, width=1):
    """Lines (pixels,), 0 or 1, where the region changes or the depth jumps by so many units."""
    line = edges(region, scene.depth, jump * scene.scale, width)
    return line.take(scene.pixels).astype(np.float32)


def layer(scene, values):
    """Values (pixels,) as a picture (160, 160), which is 0 elsewhere."""
    fine = np.zeros((FINE, FINE), np.float32)
    fine.flat[scene.pixels] = values
    return np.asarray(Image.fromarray(fine).reduce(2))


def stamp(scene, backdrop, colors):
    """Puts colors (pixels, 3) on a fine backdrop: a picture (160, 160, 3)."""
    fine = np.array(backdrop)
    fine.reshape(-1, 3)[scene.pixels] = np.clip(colors, 0, 255)
    return np.asarray(Image.fromarray(fine).reduce(2))


def picture_of(values):
    """Values between 0 and 255 as Pillow's image; what is beyond is clipped."""
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def make_backdrop(grid):
    """A few colors (rows, columns, 3) blended into a fine image, and a pen to draw on it."""
    image = picture_of(grid).resize((FINE, FINE), Image.Resampling.BICUBIC)
    return image, ImageDraw.Draw(image)


def noise(rng, cells):
    """Smooth random values (160, 160, 1) between -1 and 1, with so many bumps across."""
    grid = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((SIZE, SIZE), Image.Resampling.BILINEAR))[..., None]


def pick(rng, colors):
    """One of the colors: (3,)."""
    return np.array(colors[rng.integers(len(colors))], np.float32)


def ink(color):
    """A color (3,) as Pillow's pens take it."""
    return tuple(color.astype(int))


def pigments(rng, skin, colors):
    """A color for each material (11, 3); clothes and things take theirs from `colors`."""
    table = np.zeros((MATERIALS, 3), np.float32)
    table[SKIN] = skin
    table[LOCKS] = (35, 25, 20)
    table[WHITE] = (245, 245, 245)
    table[BLACK] = (20, 15, 15)
    table[RED] = (170, 70, 70)
    table[TOP:] = rng.permutation(colors)[:5]
    return table


# ---- 5. The styles: each turns a scene into a picture (160, 160, 3) -------------------------------

PALE_SKIN = np.array([250, 212, 185])
DARK_SKIN = np.array([92, 58, 40])
HAIR_COLORS = [
    (25, 18, 15),  # black
    (75, 48, 28),  # brown
    (190, 150, 90),  # fair
    (130, 125, 120)]  # grey


def dull_colors(rng, *shape):
    """Random colors (*shape, 3) that are nearly grey, and a little warm."""
    grey = rng.uniform(45, 215, (*shape, 1))
    return grey + rng.normal(0, 17, (*shape, 3)) + (6, 0, -6)


def photo(scene, rng):
    # A blurred room with some things in it.
    image, pen = make_backdrop(dull_colors(rng, 3, 3))
    places = rng.uniform(0, FINE, (14, 4))
    colors = dull_colors(rng, rng.integers(14))
    for (x, y, w, h), color in zip(places, colors):
        corners = (x - w / 3, y - h / 4, x + w / 3, y + h / 4)
        if w < 200:
            pen.rectangle(corners, fill=ink(color))
        else:
            pen.ellipse(corners, fill=ink(color))

    # The person in a plain or a striped shirt.
    tone = rng.random()
    skin = tone * PALE_SKIN + (1 - tone) * DARK_SKIN
    colors = 1.1 * dull_colors(rng, 9) + rng.normal(0, 25, (9, 3))
    table = pigments(rng, skin, colors)
    table[LOCKS] = pick(rng, HAIR_COLORS)
    table[BAR] = table[SKIN]  # some of the clutter is as dangerous for an estimator as an arm
    shade = light(scene, rng.uniform((-1, -1, 0.3), (1, 0.2, 1)), rng.uniform(0.25, 0.6))
    if rng.random() < 0.5:
        x = scene.pixels % FINE
        y = scene.pixels // FINE
        stripes = np.sin(x * rng.normal(0, 0.2) + y * rng.normal(0, 0.2))
        shade *= 1 + 0.3 * stripes * (scene.material == TOP)
    picture = stamp(scene, image, table[scene.material] * shade[:, None])
    picture = picture_of(picture * (1 + 0.12 * noise(rng, 40)))

    # The camera: contrast, brightness of each channel, focus and grain.
    curve = 255 * np.linspace(0, 1, 256) ** rng.uniform(0.7, 1.4)
    curves = curve * rng.uniform(0.85, 1.15, (3, 1))
    picture = picture.point(curves.ravel().astype(int).tolist())
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.9)))
    grain = rng.uniform(1, 10)
    return np.asarray(picture) + grain * rng.standard_normal((SIZE, SIZE, 3), np.float32)


CARTOON_COLORS = [
    (230, 60, 60),  # red
    (250, 200, 50),  # yellow
    (60, 160, 230),  # blue
    (80, 190, 90),  # green
    (240, 130, 40),  # orange
    (150, 90, 200)]  # violet
CARTOON_SKIES = [
    (150, 215, 250),  # blue
    (255, 225, 150),  # yellow
    (250, 190, 200),  # pink
    (190, 235, 200)]  # green
CARTOON_SKINS = [
    (255, 214, 170),  # pale
    (255, 225, 80),  # yellow
    (150, 95, 60),  # brown
    (140, 200, 240)]  # blue
CARTOON_HAIR = [
    (40, 30, 40),  # black
    (120, 60, 30),  # brown
    (250, 200, 60),  # blond
    (220, 70, 60)]  # red


def cartoon(scene, rng):
    sky = pick(rng, CARTOON_SKIES)
    image, pen = make_backdrop([[sky]])
    for angle in np.arange(0, 2 * np.pi, np.pi / 8):  # sunbeams from the middle
        beam = [(160, 160)]
        for a in (angle, angle + 0.2):
            beam.append((160 + 300 * np.cos(a), 160 + 300 * np.sin(a)))
        pen.polygon(beam, fill=ink(0.65 * sky + 90))
    for x in rng.integers(0, FINE, 3):  # hills
        hill = (x - 150, 230 + x // 8, x + 150, 600)
        pen.ellipse(hill, fill=CARTOON_COLORS[rng.integers(6)])

    table = pigments(rng, pick(rng, CARTOON_SKINS), CARTOON_COLORS)
    table[LOCKS] = pick(rng, CARTOON_HAIR)
    lit = light(scene, (-0.6, -0.7, 0.6)) > 0.35
    shade = np.where(lit, np.float32(1), 0.78)  # two flat tones
    shade *= 1 - outline(scene, scene.outfit[scene.part], width=2)
    return stamp(scene, image, table[scene.material] * shade[:, None])


PENCILS = [
    (50, 50, 60),  # graphite
    (110, 60, 40),  # red chalk
    (40, 50, 100)]  # blue


def sketch(scene, rng):
    rows, columns = np.ogrid[:SIZE, :SIZE]
    lines = layer(scene, outline(scene, scene.outfit[scene.part]))
    strength = np.zeros((SIZE, SIZE), np.float32)
    for _ in range(2):  # the hand searches for the contour twice
        dy = np.rint(3 * noise(rng, 6)[..., 0]).astype(int)
        dx = np.rint(3 * noise(rng, 6)[..., 0]).astype(int)
        shaky = lines[nearest_pixel(rows + dy), nearest_pixel(columns + dx)]
        strength = np.maximum(strength, 1.4 * shaky)

    dark = layer(scene, 1 - light(scene, (-0.7, -0.6, 0.5)))
    hatch = ((columns + rows) % 4 < 1) & (dark > 0.7)
    hatch |= ((columns - rows) % 4 < 1) & (dark > 0.9)
    strength = np.clip(strength + 0.5 * hatch, 0, 1)[..., None]
    paper = np.float32((246, 240, 226)) + 5 * noise(rng, 80)
    image = picture_of(paper + (pick(rng, PENCILS) - paper) * strength)

    pen = ImageDraw.Draw(image)
    joints = rng.choice(scene.joints / 2, 5)
    for (x, y, _), (dx, dy) in zip(joints, rng.normal(0, 40, (5, 2))):  # construction lines
        pen.line((x - dx, y - dy, x + dx, y + dy), fill=(190, 182, 175))
        pen.circle((x, y), abs(dx) / 3, outline=(200, 192, 185))
    return image


def nearest_pixel(places):
    """Rows or columns of a picture: those beyond the border become the border's."""
    return np.clip(places, 0, SIZE - 1)


EARTH_COLORS = [
    (150, 50, 40),  # red
    (190, 140, 75),  # ochre
    (95, 100, 60),  # olive
    (65, 85, 125),  # blue
    (130, 85, 55),  # brown
    (215, 195, 155),  # sand
    (110, 55, 75)]  # wine
OIL_SKINS = [
    (245, 195, 150),
    (215, 155, 110),
    (150, 100, 70)]


@lru_cache
def brush_strokes():
    """For each pixel the offset (2, 160, 160), in y and x, to the middle of the brush stroke that
    covers the pixel. The strokes are the same for all paintings; each one shifts them."""
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
    ground = pick(rng, EARTH_COLORS)
    image, _ = make_backdrop(ground * rng.uniform(0.15, 0.5, (5, 5, 1)))
    table = pigments(rng, pick(rng, OIL_SKINS), EARTH_COLORS)
    fold(scene, 1.5)
    shade = 0.3 + 1.1 * light(scene, (rng.choice([-1, 1]), -0.7, 0.6)) ** 2
    picture = stamp(scene, image, table[scene.material] * shade[:, None])

    # Each stroke has the color that the picture has at the middle of the stroke.
    dy, dx = np.roll(brush_strokes(), rng.integers(0, SIZE, 2), (1, 2))
    rows, columns = np.ogrid[:SIZE, :SIZE]
    rows = nearest_pixel(rows + dy)
    columns = nearest_pixel(columns + dx)
    ridges = 0.05 * np.sin(rows * 13 + columns * 78)[..., None].astype(np.float32)
    return picture[rows, columns] * (1 + ridges) * np.float32((1.05, 1, 0.85)) + 8


STONES = [
    (240, 236, 226),  # marble
    (140, 105, 60),  # bronze
    (200, 125, 90),  # clay
    (165, 167, 165),  # granite
    (95, 140, 120)]  # old copper


def sculpture(scene, rng):
    stone = pick(rng, STONES)
    wall = rng.uniform(50, 190) * rng.uniform(0.85, 1, 3)
    image, pen = make_backdrop(wall * rng.uniform(0.8, 1.2, (3, 3, 1)))
    for x in range(rng.integers(60), FINE, rng.integers(60, 120)):  # a museum's niches
        pen.rounded_rectangle((x, 40, x + 36, 400), 18, fill=ink(0.8 * wall))
    x, y, _ = scene.joints[scene.joints[:, 1].argmax()]  # the lowest joint stands on a plinth
    pen.rectangle((x - 70, y + 6, x + 70, 2 * FINE), fill=ink(0.7 * stone))
    pen.rectangle((x - 82, y + 2, x + 82, y + 16), fill=ink(0.85 * stone))

    fold(scene, 1.5)
    shade = light(scene, (rng.choice([-0.8, 0.8]), -0.8, 0.6), ambient=0.2)
    gloss = rng.uniform(0, 0.6) * shade ** 9
    crevices = 0.25 * outline(scene, scene.part)
    shade += gloss - crevices
    picture = stamp(scene, image, stone * shade[:, None])
    return picture * (1 + 0.08 * noise(rng, 30) + 0.08 * noise(rng, 80))


DUSK = (185, 90, 20)
GLOW = (255, 235, 150)
LEATHERS = [
    (130, 25, 15),  # red
    (35, 80, 30),  # green
    (70, 40, 15),  # brown
    (150, 90, 10),  # yellow
    (30, 40, 60),  # blue
    (90, 20, 60)]  # purple
PUPPET_SKINS = [
    (150, 80, 20),
    (60, 30, 12)]


def shadow_play(scene, rng):
    image, pen = make_backdrop([[DUSK, DUSK, DUSK], [DUSK, GLOW, DUSK], [DUSK, DUSK, DUSK]])
    for x, y, _ in scene.joints[9:11]:  # rods move the wrists
        pen.line((x, y, x + rng.uniform(-60, 60), FINE), fill=(50, 25, 10), width=3)
    table = pigments(rng, pick(rng, PUPPET_SKINS), LEATHERS)
    if rng.random() < 0.4:
        table[:] = (22, 12, 6)  # a plain black puppet

    # Light shines through the joints between parts, and through a pattern of holes.
    x = scene.pixels % FINE
    y = scene.pixels // FINE
    size = rng.uniform(0.4, 0.7)
    pattern = np.sin(size * (x + y)) * np.sin(size * (x - y)) > 0.5
    holes = pattern & (scene.material == TOP)
    cut = 0.8 * np.maximum(outline(scene, scene.part, jump=1e9), holes)[:, None]
    colors = table[scene.material] * (1 - cut) + np.float32((255, 200, 100)) * cut
    image = picture_of(stamp(scene, image, colors) * (1 + 0.05 * noise(rng, 60)))

    pen = ImageDraw.Draw(image)
    rivets = scene.joints[5:][~scene.covered[5:]] / 2
    for x, y, _ in rivets:
        pen.circle((x, y), 1.5, fill=(255, 215, 120), outline=(40, 20, 5))
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.8)))


SILKS = [
    (228, 222, 208),  # white
    (150, 165, 175),  # blue
    (205, 130, 110),  # red
    (125, 150, 125),  # green
    (110, 110, 115),  # grey
    (215, 195, 150)]  # yellow
SEAL = [(2, 3), (9, 3), (3, 8), (9, 8)]  # the stroke on it, in pixels


def ink_painting(scene, rng):
    paper = np.float32((238, 228, 205)) * (1 + 0.03 * noise(rng, 5) + 0.03 * noise(rng, 70))
    columns = np.arange(SIZE)
    for height in rng.uniform(20, 110, 3):  # mountains, which fade downwards
        bumps = np.interp(columns, np.linspace(0, SIZE, 8), rng.uniform(-25, 25, 8))
        ridge = height + bumps
        below = np.float32(np.arange(SIZE)[:, None] - ridge)[..., None]
        paper -= 60 * np.exp(-np.maximum(below, 0) / 14) * (below > 0)

    # Wet color, thinner here and there.
    shade = 0.7 + 0.35 * light(scene, (0.3, -0.6, 0.7))
    wet = picture_of(paper).resize((FINE, FINE), Image.Resampling.BOX)
    table = pigments(rng, (240, 220, 195), SILKS)
    wash = stamp(scene, wet, table[scene.material] * shade[:, None])
    picture = paper + (wash - paper) * np.clip(0.8 + 0.5 * noise(rng, 8), 0, 1)

    # Lines, thick and thin.
    line = picture_of(layer(scene, 255 * outline(scene, scene.outfit[scene.part], width=2)))
    line = np.asarray(line.filter(ImageFilter.GaussianBlur(0.8)))[..., None] / np.float32(255)
    strength = np.clip(line * (1.6 + 1.8 * noise(rng, 12)), 0, 1)
    image = picture_of(picture + (20 - picture) * strength)

    # The seal, in one of the corners.
    pen = ImageDraw.Draw(image)
    x, y = rng.choice([6, 142], 2).tolist()
    pen.rectangle((x, y, x + 11, y + 11), fill=(190, 40, 30))
    pen.line([(x + dx, y + dy) for dx, dy in SEAL], fill=(240, 220, 200))
    return image


JEWELS = [
    (210, 30, 45),  # red
    (35, 80, 200),  # blue
    (25, 150, 90),  # green
    (240, 180, 40),  # yellow
    (125, 50, 160),  # violet
    (235, 110, 35)]  # orange
PANES = 80


@lru_cache
def panes():
    """Voronoi cells (320, 320): the number of the nearest of 80 random points. The cells wrap
    around at the borders. They are the same for all windows; each one shifts them."""
    points = np.random.default_rng(0).uniform(0, FINE, (PANES, 2, 1))
    apart = np.abs(points - np.arange(FINE))
    y, x = (np.minimum(apart, FINE - apart) ** 2).transpose(1, 0, 2)
    return (y[:, :, None] + x[:, None, :]).argmin(0).astype(np.uint16)


def stained_glass(scene, rng):
    table = pigments(rng, (245, 210, 165), JEWELS)
    table[LOCKS] = (110, 60, 25)
    table[THING] = (245, 205, 70)
    table[NONE] = 0.6 * pick(rng, JEWELS[:3])

    # A saint has a nimbus, and a face of a single pane.
    x, y, _ = scene.joints[0]
    rows, columns = np.ogrid[:FINE, :FINE]
    nimbus = np.hypot(columns - x, rows - y) < 0.19 * scene.scale
    scene.part[nimbus & (scene.part == NONE)] = CLUTTER
    cells = np.roll(panes(), rng.integers(0, FINE, 2), (0, 1))
    cells = cells * (scene.part != HEAD)

    # Each material has its own tint in each pane.
    tints = table[:, None] * rng.uniform(0.7, 1.3, (PANES, 1))  # (11, 80, 3)
    tints = tints.clip(0, 255).astype(np.uint8)
    window = tints[scene.outfit[scene.part], cells]
    pieces = scene.part * np.uint16(PANES) + cells  # a number for each part and pane
    lead = edges(pieces, scene.depth, jump=np.inf)
    window[lead] = 25
    picture = np.asarray(Image.fromarray(window).reduce(2))
    return picture * (1 + 0.2 * noise(rng, 4) + 0.08 * noise(rng, 70)) + 10


STYLES = {
    "photo": Style(
        photo,
        poses="stand stand walk walk run sit cheer cheer dance",
        yaw=(0, 110),
        clutter=5),
    "cartoon": Style(
        cartoon,
        yaw=(0, 60),
        head=2.1, eyes=1.5, thick=1.1, legs=0.65, arms=0.85),
    "sketch": Style(
        sketch,
        thick=0.9, legs=1.1, arms=1.05),
    "oil painting": Style(
        oil_painting,
        poses="stand walk sit sit dance bend cheer",
        yaw=(0, 120),
        thick=1.1, robe=0.6),
    "sculpture": Style(
        sculpture,
        poses="stand stand dance sit squat cheer bend run",
        yaw=(0, 130),
        thick=1.1, robe=0.4),
    "shadow play": Style(
        shadow_play,
        poses="stand walk walk run dance dance cheer sit bend",
        yaw=(60, 105),
        head=1.5, eyes=1.3, robe=0.4),
    "ink painting": Style(
        ink_painting,
        poses="stand stand walk sit dance squat bend cheer",
        yaw=(10, 110),
        robe=0.85),
    "stained glass": Style(
        stained_glass,
        poses="stand stand stand walk sit cheer dance",
        yaw=(0, 30),
        head=1.25, eyes=1.3, robe=0.7)}


def draw_figure(style: str, rng: np.random.Generator) -> Figure:
    """Draws one random person in a style of STYLES.

    The same state of the generator gives the same figure. Raises KeyError for an unknown style.
    """
    scene = compose(STYLES[style], rng)
    silhouette = (scene.part != NONE) & (scene.part < OBJECT)
    silhouette = Image.fromarray(silhouette).convert("L").reduce(2)
    silhouette = silhouette.point(lambda share: share >= 128)  # at least half of the pixel
    left, top, right, bottom = silhouette.getbbox()

    places = (scene.joints[:, :2] - 0.5) / 2  # the middle of pixel x is at fine pixel 2x + 0.5
    keypoints = np.column_stack([places, 2 - scene.covered])
    outside = ((places < 0) | (places > SIZE - 1)).any(1)
    keypoints[outside] = 0

    image = picture_of(STYLES[style].paint(scene, rng))
    box = (left, top, right - left, bottom - top)
    return Figure(np.asarray(image), keypoints, box, area=int(np.asarray(silhouette).sum()))


# ---- 6. The data set ------------------------------------------------------------------------------

FIGURE_COUNTS = {"train": (4000, 600), "val": (300, 100)}  # of photos, and of each other style
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

    counts: how many photos, and how many figures of each other style, a split has: {split: (4, 2)}
    progress: called with the parts of a split, and with words for them; gives the parts one by one
    """
    for split_number, split in enumerate(counts):
        jobs = list_jobs(folder, split_number, split, *counts[split])
        # A DataLoader's processes end with the program that has started them, however that ends.
        drawn = DataLoader(
            jobs, batch_size=50, num_workers=os.cpu_count(), collate_fn=draw_some)
        images = []
        people = []
        for part in progress(drawn, f"drawing {split} figures, parts of 50"):
            for image, person in part:
                images.append(image)
                people.append(person)
        content = {"images": images, "annotations": people, "categories": [coco_category()]}
        path = Path(folder) / "annotations" / ANNOTATIONS[split]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")


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
    """The category of people; COCO's skeleton counts joints from 1."""
    skeletons = json.loads((HERE / "skeletons.json").read_text(encoding="utf-8"))
    names = skeletons["COCO17"]["names"]
    edges = [[a + 1, b + 1] for a, b in skeletons["COCO17"]["edges"]]
    return {"id": 1, "name": "person", "keypoints": names, "skeleton": edges}
