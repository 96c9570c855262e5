"""The toy world's scenes: a stand-in for photos, drawn on the fly with Pillow.

    image = scene("benchmark", 2, 7)           # RGB PIL image, 128 pixels square
    things = scene_objects("benchmark", 2, 7)  # what it shows

A scene is a function of (domain, seed, index) alone and takes 1-2 ms to draw.
"""
import numpy as np
from PIL import Image, ImageDraw

SCENE_SIZE = 128  # pixels; drawn at twice the size and reduced
COLOURS = {"red": (214, 40, 40), "orange": (244, 140, 30), "yellow": (242, 208, 40),
           "green": (50, 160, 70), "blue": (40, 100, 215), "purple": (130, 60, 170),
           "pink": (240, 130, 180), "brown": (130, 85, 50)}


# outlines of THINGS: points float64 [n, 2], in [-1, 1] with y down; angles are in degrees

def oval(x, y, rx, ry=None, start=0, stop=360, points=22):
    angle = np.radians(np.linspace(start, stop, points))
    return np.stack([x + rx * np.cos(angle), y + (ry or rx) * np.sin(angle)], 1)


def box(left, top, right, bottom):
    return polygon(left, top, right, top, right, bottom, left, bottom)


def polygon(*coordinates):
    return np.array(coordinates, dtype=float).reshape(-1, 2)


def line(x0, y0, x1, y1, width=0.16):
    along = np.array([x1 - x0, y1 - y0])
    side = np.array([-along[1], along[0]]) * (width / 2 / np.hypot(*along))
    ends = np.array([[x0, y0], [x1, y1]])
    return np.concatenate([ends + side, (ends - side)[::-1]])


def ring(x, y, outer, inner, start=0, stop=360):
    return np.concatenate([oval(x, y, outer, None, start, stop, 28),
                           oval(x, y, inner, None, start, stop, 28)[::-1]])


def rays(count, outer, inner, turn=-90):
    angle = np.radians(turn + np.arange(2 * count) * 180 / count)
    radius = np.where(np.arange(2 * count) % 2 == 0, outer, inner)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


# label -> outlines in [-1, 1] (y down), each in the thing's colour (0), darker (1), lighter (2),
# white (3) or black (4); later outlines lie over earlier ones
MAIN, DARK, LIGHT, WHITE, BLACK = range(5)
THINGS = {
    "anchor": [(line(0, -0.6, 0, 0.9), MAIN), (ring(0, -0.75, 0.24, 0.1), MAIN),
               (line(-0.45, -0.3, 0.45, -0.3), MAIN), (ring(0, 0.1, 0.85, 0.65, 15, 165), MAIN),
               (polygon(-1, 0.15, -0.8, 0.55, -0.5, 0.3), MAIN),
               (polygon(1, 0.15, 0.8, 0.55, 0.5, 0.3), MAIN)],
    "apple": [(oval(-0.3, 0.2, 0.55, 0.7), MAIN), (oval(0.3, 0.2, 0.55, 0.7), MAIN),
              (line(0, -0.4, 0.12, -0.95, 0.14), BLACK), (oval(0.42, -0.7, 0.32, 0.14), LIGHT)],
    "arrow": [(polygon(-1, -0.25, 0.1, -0.25, 0.1, -0.7, 1, 0, 0.1, 0.7, 0.1, 0.25, -1, 0.25),
               MAIN)],
    "balloon": [(oval(0, -0.35, 0.6, 0.65), MAIN), (polygon(0, 0.2, -0.15, 0.42, 0.15, 0.42), MAIN),
                (line(0, 0.4, 0.12, 1, 0.07), BLACK), (oval(-0.22, -0.55, 0.12, 0.18), LIGHT)],
    "bell": [(oval(0, -0.2, 0.5, 0.65, 180, 360), MAIN),
             (polygon(-0.5, -0.22, 0.5, -0.22, 0.85, 0.6, -0.85, 0.6), MAIN),
             (oval(0, 0.75, 0.22), DARK), (oval(0, -0.85, 0.14), DARK)],
    "bird": [(oval(0, 0.1, 0.65, 0.42), MAIN), (oval(0.55, -0.35, 0.3), MAIN),
             (polygon(0.8, -0.45, 1.05, -0.3, 0.8, -0.22), BLACK),
             (polygon(-0.5, 0, -1.05, -0.3, -1, 0.25), MAIN), (oval(-0.1, 0.05, 0.35, 0.22), DARK),
             (oval(0.6, -0.42, 0.07), WHITE), (line(-0.05, 0.45, -0.05, 0.9, 0.08), BLACK),
             (line(0.2, 0.45, 0.2, 0.9, 0.08), BLACK)],
    "boat": [(polygon(-1, 0.35, 1, 0.35, 0.65, 0.85, -0.65, 0.85), MAIN),
             (line(0, -0.95, 0, 0.35, 0.1), BLACK),
             (polygon(0.1, -0.85, 0.1, 0.2, 0.85, 0.2), LIGHT),
             (polygon(-0.1, -0.6, -0.1, 0.2, -0.65, 0.2), LIGHT)],
    "bone": [(line(-0.55, 0, 0.55, 0, 0.34), MAIN), (oval(-0.68, -0.25, 0.3), MAIN),
             (oval(-0.68, 0.25, 0.3), MAIN), (oval(0.68, -0.25, 0.3), MAIN),
             (oval(0.68, 0.25, 0.3), MAIN)],
    "book": [(polygon(-1, -0.55, 0, -0.4, 0, 0.75, -1, 0.6), MAIN),
             (polygon(1, -0.55, 0, -0.4, 0, 0.75, 1, 0.6), DARK),
             (polygon(-0.88, -0.42, -0.06, -0.3, -0.06, 0.6, -0.88, 0.48), WHITE),
             (polygon(0.88, -0.42, 0.06, -0.3, 0.06, 0.6, 0.88, 0.48), WHITE),
             (line(-0.75, -0.1, -0.2, -0.02, 0.07), BLACK),
             (line(0.75, -0.1, 0.2, -0.02, 0.07), BLACK)],
    "bottle": [(box(-0.36, -0.25, 0.36, 1), MAIN), (oval(0, -0.25, 0.36, 0.3), MAIN),
               (box(-0.14, -0.85, 0.14, -0.3), MAIN), (box(-0.2, -1, 0.2, -0.82), BLACK),
               (box(-0.36, 0.1, 0.36, 0.6), WHITE)],
    "butterfly": [(oval(-0.52, -0.38, 0.46, 0.5), MAIN), (oval(0.52, -0.38, 0.46, 0.5), MAIN),
                  (oval(-0.42, 0.45, 0.36, 0.42), DARK), (oval(0.42, 0.45, 0.36, 0.42), DARK),
                  (oval(-0.52, -0.38, 0.2), LIGHT), (oval(0.52, -0.38, 0.2), LIGHT),
                  (oval(0, 0, 0.11, 0.75), BLACK)],
    "cactus": [(box(-0.22, -0.8, 0.22, 1), MAIN), (oval(0, -0.8, 0.22), MAIN),
               (line(-0.75, 0.25, -0.2, 0.25, 0.26), MAIN), (box(-0.88, -0.4, -0.62, 0.38), MAIN),
               (line(0.75, 0, 0.2, 0, 0.26), MAIN), (box(0.62, -0.6, 0.88, 0.13), MAIN)],
    "candle": [(box(-0.26, -0.2, 0.26, 0.85), MAIN), (box(-0.55, 0.8, 0.55, 1), DARK),
               (line(0, -0.2, 0, -0.45, 0.07), BLACK),
               (polygon(0, -1, 0.2, -0.58, 0, -0.38, -0.2, -0.58), LIGHT)],
    "car": [(polygon(-0.5, -0.1, -0.3, -0.55, 0.35, -0.55, 0.6, -0.1), MAIN),
            (box(-1, -0.12, 1, 0.38), MAIN), (polygon(-0.3, -0.12, -0.2, -0.42, 0, -0.42, 0, -0.12),
                                              WHITE),
            (polygon(0.1, -0.12, 0.1, -0.42, 0.28, -0.42, 0.42, -0.12), WHITE),
            (oval(-0.55, 0.4, 0.27), BLACK), (oval(0.55, 0.4, 0.27), BLACK)],
    "chair": [(box(-0.6, -1, -0.38, 1), MAIN), (box(-0.6, 0, 0.6, 0.22), MAIN),
              (box(0.38, 0.1, 0.6, 1), MAIN), (box(-0.4, -0.9, -0.3, 0), DARK)],
    "clock": [(oval(0, 0, 0.95), MAIN), (oval(0, 0, 0.74), WHITE),
              (line(0, 0, 0, -0.58, 0.12), BLACK), (line(0, 0, 0.42, 0.2, 0.12), BLACK)],
    "cloud": [(oval(-0.5, 0.15, 0.45), MAIN), (oval(0, -0.15, 0.52), MAIN),
              (oval(0.52, 0.15, 0.43), MAIN), (box(-0.5, 0.15, 0.55, 0.58), MAIN)],
    "crown": [(polygon(-0.9, 0.6, -0.95, -0.5, -0.45, 0.05, 0, -0.75, 0.45, 0.05, 0.95, -0.5,
                       0.9, 0.6), MAIN), (box(-0.9, 0.4, 0.9, 0.68), DARK),
              (oval(0, -0.75, 0.14), LIGHT), (oval(-0.95, -0.5, 0.13), LIGHT),
              (oval(0.95, -0.5, 0.13), LIGHT)],
    "cup": [(polygon(-0.7, -0.55, 0.45, -0.55, 0.35, 0.7, -0.6, 0.7), MAIN),
            (ring(0.55, 0, 0.42, 0.25, -100, 100), MAIN), (oval(-0.12, -0.55, 0.57, 0.14), DARK)],
    "diamond": [(polygon(-0.55, -0.65, 0.55, -0.65, 1, -0.15, 0, 0.9, -1, -0.15), MAIN),
                (polygon(-0.35, -0.15, 0.35, -0.15, 0, 0.9), LIGHT),
                (line(-1, -0.15, 1, -0.15, 0.07), DARK)],
    "envelope": [(box(-1, -0.65, 1, 0.65), MAIN),
                 (polygon(-0.95, -0.62, 0.95, -0.62, 0, 0.2), LIGHT),
                 (line(-0.97, -0.62, 0, 0.2, 0.08), DARK), (line(0.97, -0.62, 0, 0.2, 0.08), DARK)],
    "fish": [(oval(0.15, 0, 0.75, 0.45), MAIN), (polygon(-0.45, 0, -1, -0.45, -1, 0.45), MAIN),
             (polygon(0, -0.4, 0.35, -0.42, 0.05, -0.75), DARK), (oval(0.55, -0.12, 0.11), WHITE),
             (oval(0.57, -0.12, 0.06), BLACK)],
    "flag": [(line(-0.7, -1, -0.7, 1, 0.13), BLACK),
             (polygon(-0.62, -0.92, 0.85, -0.75, 0.55, -0.35, 0.85, 0.1, -0.62, -0.05), MAIN)],
    "flower": [*[(oval(0.42 * np.cos(a), -0.35 + 0.42 * np.sin(a), 0.28), MAIN)
                 for a in np.radians(np.arange(0, 360, 60))], (oval(0, -0.35, 0.24), WHITE),
               (line(0, 0.3, 0, 1, 0.1), BLACK), (oval(0.24, 0.65, 0.24, 0.1), DARK)],
    "fork": [(line(0, -0.1, 0, 1, 0.17), MAIN), (box(-0.38, -0.3, 0.38, -0.08), MAIN),
             *[(line(x, -1, x, -0.2, 0.13), MAIN) for x in (-0.32, 0, 0.32)]],
    "ghost": [(oval(0, -0.3, 0.65, 0.68), MAIN),
              (polygon(-0.65, -0.3, 0.65, -0.3, 0.65, 0.95, 0.33, 0.65, 0, 0.95, -0.33, 0.65,
                       -0.65, 0.95), MAIN), (oval(-0.24, -0.3, 0.13, 0.19), WHITE),
              (oval(0.24, -0.3, 0.13, 0.19), WHITE), (oval(0, 0.1, 0.13), BLACK)],
    "glasses": [(ring(-0.52, 0, 0.46, 0.3), MAIN), (ring(0.52, 0, 0.46, 0.3), MAIN),
                (line(-0.12, -0.08, 0.12, -0.08, 0.15), MAIN), (oval(-0.52, 0, 0.3), WHITE),
                (oval(0.52, 0, 0.3), WHITE)],
    "hammer": [(line(0, -0.5, 0, 1, 0.2), BLACK), (box(-0.6, -0.95, 0.45, -0.45), MAIN),
               (polygon(0.45, -0.95, 0.9, -0.65, 0.45, -0.5), MAIN)],
    "hat": [(oval(0, 0.5, 1, 0.25), MAIN), (polygon(-0.5, 0.45, -0.45, -0.6, 0.45, -0.6, 0.5, 0.45),
                                            MAIN), (box(-0.5, 0.12, 0.5, 0.38), BLACK)],
    "heart": [(oval(-0.43, -0.35, 0.48), MAIN), (oval(0.43, -0.35, 0.48), MAIN),
              (polygon(-0.86, -0.14, 0, -0.3, 0.86, -0.14, 0, 0.9), MAIN)],
    "house": [(box(-0.7, -0.1, 0.7, 0.9), MAIN), (polygon(-1, -0.05, 0, -0.95, 1, -0.05), DARK),
              (box(-0.16, 0.3, 0.2, 0.9), BLACK), (box(-0.55, 0.15, -0.28, 0.42), WHITE),
              (box(0.34, 0.15, 0.6, 0.42), WHITE)],
    "ice cream": [(polygon(-0.45, 0, 0.45, 0, 0, 1), BLACK),
                  (polygon(-0.33, 0.05, 0.33, 0.05, 0, 0.85), LIGHT), (oval(0, -0.45, 0.5), MAIN),
                  (oval(-0.25, -0.1, 0.3, 0.22), MAIN), (oval(0.25, -0.1, 0.3, 0.22), MAIN)],
    "key": [(ring(-0.6, 0, 0.42, 0.2), MAIN), (line(-0.2, 0, 1, 0, 0.17), MAIN),
            (line(0.85, 0, 0.85, 0.4, 0.16), MAIN), (line(0.5, 0, 0.5, 0.32, 0.16), MAIN)],
    "kite": [(polygon(0, -1, 0.55, -0.3, 0, 0.45, -0.55, -0.3), MAIN),
             (polygon(0, -1, 0.55, -0.3, 0, -0.3), DARK), (polygon(0, 0.45, -0.55, -0.3, 0, -0.3),
                                                           DARK),
             (line(0, 0.45, 0.2, 0.75, 0.06), BLACK), (line(0.2, 0.75, 0, 1, 0.06), BLACK)],
    "ladder": [(line(-0.4, -1, -0.4, 1, 0.14), MAIN), (line(0.4, -1, 0.4, 1, 0.14), MAIN),
               *[(line(-0.4, y, 0.4, y, 0.13), MAIN) for y in (-0.72, -0.24, 0.24, 0.72)]],
    "lamp": [(polygon(-0.35, -0.95, 0.35, -0.95, 0.75, -0.1, -0.75, -0.1), MAIN),
             (line(0, -0.1, 0, 0.85, 0.14), BLACK), (oval(0, 0.87, 0.45, 0.14), BLACK)],
    "leaf": [(np.concatenate([oval(0, 0.8, 1.25, None, 220, 320),
                              oval(0, -0.8, 1.25, None, 40, 140)])
              @ np.array([[0.8, -0.6], [0.6, 0.8]]), MAIN),
             (line(-0.9, 0.68, 0.5, -0.38, 0.08), DARK)],
    "lock": [(ring(0, -0.3, 0.5, 0.32, 180, 360), DARK), (box(-0.5, -0.3, -0.32, 0), DARK),
             (box(0.32, -0.3, 0.5, 0), DARK), (box(-0.7, -0.08, 0.7, 0.9), MAIN),
             (oval(0, 0.3, 0.16), BLACK), (line(0, 0.3, 0, 0.65, 0.13), BLACK)],
    "magnet": [(ring(0, -0.1, 0.8, 0.38, 180, 360), MAIN), (box(-0.8, -0.12, -0.38, 0.6), MAIN),
               (box(0.38, -0.12, 0.8, 0.6), MAIN), (box(-0.8, 0.5, -0.38, 0.9), BLACK),
               (box(0.38, 0.5, 0.8, 0.9), BLACK)],
    "moon": [(np.concatenate([oval(0, 0, 0.95, None, 50, 310, 30),
                              oval(0.42, 0, 0.74, None, 285, 75, 24)]), MAIN)],
    "mushroom": [(box(-0.25, 0, 0.25, 0.9), WHITE), (oval(0, 0.05, 0.9, 0.9, 180, 360), MAIN),
                 (oval(-0.4, -0.3, 0.17), WHITE), (oval(0.25, -0.5, 0.17), WHITE),
                 (oval(0.5, -0.15, 0.12), WHITE)],
    "pencil": [(box(-0.24, -0.7, 0.24, 0.5), MAIN), (box(-0.24, -1, 0.24, -0.75), DARK),
               (polygon(-0.24, 0.5, 0.24, 0.5, 0, 1), WHITE),
               (polygon(-0.1, 0.79, 0.1, 0.79, 0, 1), BLACK), (line(0, -0.7, 0, 0.5, 0.1), LIGHT)],
    "ring": [(ring(0, 0.25, 0.7, 0.5), MAIN),
             (polygon(-0.3, -0.9, 0.3, -0.9, 0.45, -0.65, 0, -0.2, -0.45, -0.65), DARK),
             (polygon(-0.15, -0.65, 0.15, -0.65, 0, -0.2), LIGHT)],
    "rocket": [(polygon(0, -1, 0.35, -0.4, 0.35, 0.5, -0.35, 0.5, -0.35, -0.4), MAIN),
               (polygon(-0.35, 0.1, -0.75, 0.7, -0.35, 0.5), DARK),
               (polygon(0.35, 0.1, 0.75, 0.7, 0.35, 0.5), DARK), (oval(0, -0.2, 0.18), WHITE),
               (polygon(-0.2, 0.55, 0.2, 0.55, 0, 1), LIGHT)],
    "scissors": [(line(-0.35, 0.35, 0.45, -0.95, 0.15), BLACK),
                 (line(0.35, 0.35, -0.45, -0.95, 0.15), BLACK),
                 (ring(-0.45, 0.62, 0.36, 0.17), MAIN), (ring(0.45, 0.62, 0.36, 0.17), MAIN)],
    "shirt": [(polygon(-0.4, -0.8, 0.4, -0.8, 1, -0.35, 0.75, 0.1, 0.5, -0.1, 0.5, 0.9, -0.5, 0.9,
                       -0.5, -0.1, -0.75, 0.1, -1, -0.35), MAIN),
              (oval(0, -0.8, 0.22, 0.2), WHITE)],
    "snowman": [(oval(0, 0.5, 0.5), MAIN), (oval(0, -0.25, 0.36), MAIN),
                (oval(0, -0.25, 0.09), BLACK),
                (oval(0, 0.4, 0.09), BLACK), (oval(0, 0.7, 0.09), BLACK),
                (box(-0.42, -0.62, 0.42, -0.5), BLACK), (box(-0.26, -1, 0.26, -0.55), BLACK)],
    "spider": [*[(line(0, y / 3, side, y, 0.09), BLACK) for side in (-0.95, 0.95)
                 for y in (-0.75, -0.25, 0.3, 0.8)], (oval(0, 0.15, 0.45), MAIN),
               (oval(0, -0.38, 0.25), MAIN)],
    "star": [(rays(5, 1, 0.42), MAIN)],
    "sun": [(rays(11, 1, 0.66), LIGHT), (oval(0, 0, 0.58), MAIN)],
    "sword": [(polygon(-0.12, 0.35, -0.12, -0.8, 0, -1, 0.12, -0.8, 0.12, 0.35), MAIN),
              (box(-0.45, 0.32, 0.45, 0.48), BLACK), (box(-0.09, 0.45, 0.09, 0.9), DARK),
              (oval(0, 0.92, 0.13), BLACK)],
    "table": [(box(-1, -0.4, 1, -0.15), MAIN), (box(-0.85, -0.2, -0.65, 0.75), DARK),
              (box(0.65, -0.2, 0.85, 0.75), DARK)],
    "tent": [(polygon(0, -0.75, 1, 0.75, -1, 0.75), MAIN),
             (polygon(0, -0.2, 0.36, 0.75, -0.36, 0.75), BLACK),
             (line(0, -0.6, 0.14, -1, 0.08), BLACK), (line(0, -0.6, -0.14, -1, 0.08), BLACK)],
    "traffic light": [(box(-0.42, -1, 0.42, 0.62), MAIN), (box(-0.08, 0.6, 0.08, 1), BLACK),
                      (oval(0, -0.68, 0.21), WHITE), (oval(0, -0.18, 0.21), WHITE),
                      (oval(0, 0.32, 0.21), WHITE)],
    "tree": [(box(-0.15, 0.45, 0.15, 1), BLACK), (polygon(0, -0.2, 0.75, 0.55, -0.75, 0.55), MAIN),
             (polygon(0, -0.6, 0.6, 0.1, -0.6, 0.1), MAIN),
             (polygon(0, -1, 0.42, -0.35, -0.42, -0.35), MAIN)],
    "umbrella": [(oval(0, 0, 0.98, 0.85, 180, 360), MAIN),
                 (polygon(0, -0.85, 0.3, 0, -0.3, 0), DARK), (line(0, 0, 0, 0.8, 0.1), BLACK),
                 (ring(-0.18, 0.75, 0.24, 0.13, 0, 180), BLACK)],
}
LABELS = list(THINGS)  # 56, in alphabetical order
UNSEEN = list(range(2, len(LABELS), 4))  # every fourth: a quarter, chosen blindly
SEEN = [i for i in range(len(LABELS)) if i not in UNSEEN]


def scene_objects(domain, seed, index, things=None):
    """What is in a scene -> list of (thing, colour, x, y, size, angle), drawn large ones first.

    domain "web" (pre-training): 1-2 objects, seldom up to 5, large; "benchmark": 2-6, smaller,
    free to overlap a little; one that finds no place is left out, so mostly 2-4 remain. thing and
    colour are indices, x, y and size (half the width) are in scene widths, angle in degrees.
    things: the label indices to draw from, all by default."""
    generator = np.random.default_rng((seed, index, domain == "benchmark", 0))
    things = np.arange(len(LABELS)) if things is None else np.asarray(things)
    if domain == "web":
        count = generator.choice(5, p=[0.46, 0.40, 0.08, 0.04, 0.02]) + 1
        low, high = (0.24, 0.40) if count == 1 else (0.17, 0.28) if count == 2 else (0.13, 0.2)
    else:
        count, low, high = generator.integers(2, 7), 0.15, 0.27
    objects = []
    for _ in range(count):
        size = generator.uniform(low, high)
        for _ in range(30):  # a place where it covers little of the others
            x, y = generator.uniform(size * 0.9, 1 - size * 0.9, 2)
            if all(max(abs(x - other[2]), abs(y - other[3])) > 0.8 * (size + other[4])
                   for other in objects):
                break
        else:
            continue
        again = objects and generator.random() < 0.15  # two of the same kind
        thing = objects[-1][0] if again else int(generator.choice(things))
        colour = int(generator.integers(len(COLOURS)))
        objects.append((thing, colour, x, y, size, generator.uniform(-25, 25)))
    return sorted(objects, key=lambda thing: -thing[4])


def scene(domain, seed, index, things=None):
    """-> RGB PIL image of SCENE_SIZE pixels square, with what scene_objects lists."""
    generator = np.random.default_rng((seed, index, domain == "benchmark", 1))
    size, benchmark = 2 * SCENE_SIZE, domain == "benchmark"
    ground = generator.integers(195 if benchmark else 205, 256, 3)
    image = Image.new("RGB", (size, size), tuple(ground.tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(generator.integers(3, 8) if benchmark else 0):  # clutter
        x, y = generator.uniform(0, size, 2)
        colour = tuple((ground + generator.integers(-60, 40, 3)).clip(0, 255).tolist())
        if generator.random() < 0.5:
            dx, dy = generator.uniform(-60, 60, 2)
            draw.line((x, y, x + dx, y + dy), colour, int(generator.integers(2, 7)))
        else:
            rx, ry = generator.uniform(3, 22, 2)
            draw.ellipse((x - rx, y - ry, x + rx, y + ry), colour)
    palette = np.array(list(COLOURS.values()), dtype=float)
    for thing, colour, x, y, radius, angle in scene_objects(domain, seed, index, things):
        main = palette[colour] + generator.uniform(-14, 14, 3)
        if benchmark:  # slightly other colours: less saturated, in another light
            main = 0.88 * main + 0.12 * main.mean() + generator.uniform(-12, 12, 3)
        tones = np.stack([main, 0.62 * main, 0.5 * main + 127, np.full(3, 250), np.full(3, 35)])
        tones = tones.clip(0, 255).astype(int).tolist()
        cosine, sine = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        turn = radius * size * np.array([[cosine, sine], [-sine, cosine]])
        for outline, tone in THINGS[LABELS[thing]]:
            points = outline @ turn + np.array([x, y]) * size
            draw.polygon(points.ravel().tolist(), tuple(tones[tone]))
    pixels = np.asarray(image.reduce(2), dtype=np.float32)
    noise = generator.standard_normal(pixels.shape, dtype=np.float32)
    pixels = pixels + (6 if benchmark else 4) * noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


class Scenes:
    """Scenes of the benchmark domain: [i] -> RGB PIL image, drawn at its first use, then kept."""

    def __init__(self, count, seed, things=None):
        self.seed, self.things = seed, things
        self.pixels = np.empty((count, SCENE_SIZE, SCENE_SIZE, 3), np.uint8)
        self.drawn = np.zeros(count, bool)

    def __len__(self):
        return len(self.drawn)

    def __getitem__(self, index):
        if not self.drawn[index]:
            self.pixels[index] = np.asarray(scene("benchmark", self.seed, index, self.things))
            self.drawn[index] = True
        return Image.fromarray(self.pixels[index])
