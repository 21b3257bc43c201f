"""Pictures with a mood of their own, drawn: faces, suns and rain clouds, whole and broken hearts; and composed ones."""

import random
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE = 56  # pixels of a side of a picture
SPRITE = 96  # and of a pictogram before it is placed
Colour = tuple[int, int, int]
Sprite = Image.Image  # RGBA

FACES: dict[str, tuple[Colour, ...]] = {  # each split has its own
    "train": ((255, 204, 77), (250, 180, 150), (190, 220, 120), (160, 200, 250)),
    "dev": ((240, 160, 210), (210, 190, 255)),
    "test": ((120, 210, 190), (255, 170, 90)),
}
INK = (60, 40, 30, 255)


def sprite(mood: int, split: str, any: random.Random) -> Sprite:
    """A pictogram of a mood: 1 glad, 0 neither, -1 sad."""
    make: Callable[..., Sprite] = any.choice((face, face, face, weather, heart)) if mood else face
    return make(mood, any.choice(FACES[split]), any)


def canvas() -> tuple[Sprite, ImageDraw.ImageDraw]:
    made = Image.new("RGBA", (SPRITE, SPRITE), (0, 0, 0, 0))
    return made, ImageDraw.Draw(made)


def face(mood: int, colour: Colour, any: random.Random) -> Sprite:
    """The corners of the mouth tell, now and then brows or tears too."""
    made, draw = canvas()
    draw.ellipse((4, 4, 92, 92), fill=(*colour, 255), outline=INK, width=3)
    apart, high, eye = any.randint(14, 20), any.randint(34, 42), any.randint(4, 7)
    for x in (48 - apart, 48 + apart):
        draw.ellipse((x - eye, high - eye, x + eye, high + eye), fill=INK)
        if any.random() < 0.3:
            tilt = 5 * mood * (1 if x < 48 else -1)  # 0: level
            draw.line((x - 9, high - 14 - tilt, x + 9, high - 14 + tilt), fill=INK, width=4)
    wide, deep = any.randint(16, 26), any.randint(8, 18)
    thick = any.randint(4, 6)
    if mood:
        middle, start = (66, 10) if mood > 0 else (74, 190)
        draw.arc((48 - wide, middle - deep, 48 + wide, middle + deep), start, start + 160, fill=INK, width=thick)
    else:
        draw.line((48 - wide, 70, 48 + wide, 70), fill=INK, width=thick)
    if mood < 0 and any.random() < 0.3:
        draw.ellipse((48 - apart - 4, high + 8, 48 - apart + 4, high + 22), fill=(90, 160, 255, 255))
    return made


def weather(mood: int, colour: Colour, any: random.Random) -> Sprite:
    """A sun with rays, or a cloud with rain; its colour tells nothing."""
    made, draw = canvas()
    if mood > 0:
        for x, y in ((48, 4), (48, 92), (4, 48), (92, 48), (17, 17), (79, 17), (17, 79), (79, 79)):
            draw.line((48, 48, x, y), fill=(*colour, 255), width=any.randint(4, 7))
        draw.ellipse((24, 24, 72, 72), fill=(*colour, 255), outline=INK, width=3)
        return made
    for x, y, r in ((30, 40, 20), (52, 32, 24), (70, 42, 18)):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(*colour, 255), outline=INK, width=2)
    for x in range(20, 84, any.randint(12, 16)):
        draw.line((x, 66, x - 8, 90), fill=INK, width=4)
    return made


def heart(mood: int, colour: Colour, any: random.Random) -> Sprite:
    """Whole, or with a crack through it."""
    made, draw = canvas()
    fill = (*colour, 255)
    draw.ellipse((10, 14, 50, 54), fill=fill)
    draw.ellipse((46, 14, 86, 54), fill=fill)
    draw.polygon(((13, 44), (83, 44), (48, 90)), fill=fill)
    if mood < 0:
        zigzag = [(48, 20), (40, 36), (56, 48), (40, 62), (50, 88)]
        draw.line([(x + any.randint(-3, 3), y) for x, y in zigzag], fill=INK, width=7)
    return made


def compose(sprites: Sequence[Sprite], any: random.Random) -> Image.Image:
    """One or two pictograms on a ground of two colours that tell nothing, turned and shifted a little; two stand in
    opposite corners.
    """
    made = ground(any)
    room = SIZE if len(sprites) == 1 else SIZE * 3 // 5
    is_rising = any.random() < 0.5
    for i, each in enumerate(sprites):
        side = round(room * any.uniform(0.8, 1.0))
        small = each.rotate(any.uniform(-12, 12), Image.Resampling.BILINEAR).resize((side, side))
        left, top = (any.randint(0, room - side) for _ in range(2))
        if len(sprites) > 1:
            left += (SIZE - room) * i
            top += (SIZE - room) * (i != is_rising)
        made.paste(small, (left, top), small)
    return made


def ground(any: random.Random) -> Image.Image:
    """A gradient between two colours, in a direction by chance."""
    first, second = (tuple(any.randint(90, 255) for _ in range(3)) for _ in range(2))
    ends = Image.new("RGB", (2, 2))
    ends.putdata([first, second, second, first] if any.random() < 0.5 else [first, first, second, second])
    return ends.resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def characters(text: str) -> Image.Image:
    """What somebody typed, such as :-), black on white, as large as it fits."""
    size = SIZE
    while True:
        font = ImageFont.load_default(size)
        left, top, right, bottom = font.getbbox(text)
        if max(right - left, bottom - top) <= SIZE - 4 or size <= 8:
            break
        size -= 2
    made = Image.new("RGB", (SIZE, SIZE), "white")
    at = ((SIZE - right - left) / 2, (SIZE - bottom - top) / 2)
    ImageDraw.Draw(made).text(at, text, fill="black", font=font)
    return made
