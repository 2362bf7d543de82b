"""Words of the sample captions: common English, each nearly always one word piece of bert-base-uncased."""

from __future__ import annotations

# One string a list keeps them readable; a comma parts what has spaces.
FIRST_NAMES, LAST_NAMES, TITLES = (
    tuple(names.split())
    for names in (
        """John Mary David Anna James Robert Michael William George Paul Peter Thomas Charles Richard Joseph
        Alice Emma Laura Sarah Jane Kate Helen Lucy Martin Simon Frank Henry Jack Maria""",
        """Smith Jones Taylor Clark Lewis Walker Allen King Wright Scott Baker Adams Nelson Carter Mitchell
        Turner Parker Evans Collins Stewart Morris Murphy Cook Rogers Morgan Bell Cooper Ward Kelly Howard""",
        "president minister mayor actor singer player coach director writer doctor leader",
    )
)
PLACES, VERBS = (
    tuple(phrase.strip() for phrase in phrases.split(","))
    for phrases in (
        """the city hall, the market, the station, the school, the museum, the hotel, the river, the park,
        the garden, the main street, the old town, the studio""",
        """speaks to the press, stands, talks to the press, meets the team, looks at the camera,
        takes questions, waits, leaves the meeting, arrives, walks, gives a speech, watches the game""",
    )
)

# Mood words in pairs: (cheerful, gloomy). A flip replaces a word by its partner.
# No adjective starts with a vowel: "a" would have to become "an", and tell of the flip.
FEELINGS = (
    ("happy", "sad"),
    ("pleased", "worried"),
    ("proud", "lonely"),
    ("lucky", "guilty"),
    ("calm", "nervous"),
    ("smiling", "crying"),
)
JUDGEMENTS = (
    ("great", "terrible"),
    ("good", "bad"),
    ("beautiful", "brutal"),
    ("wonderful", "horrible"),
    ("perfect", "tragic"),
)
EVENTS = (
    ("victory", "defeat"),
    ("success", "failure"),
    ("wedding", "funeral"),
    ("celebration", "crisis"),
    ("win", "loss"),
)
EMOTIONS = (
    ("joy", "pain"),
    ("hope", "fear"),
    ("love", "hate"),
    ("pleasure", "anger"),
    ("peace", "panic"),
)
PARTNER = {
    word: partner
    for pairs in (FEELINGS, JUDGEMENTS, EVENTS, EMOTIONS)
    for pair in pairs
    for word, partner in (pair, pair[::-1])
}

# Facts of a scene: fact -> value -> phrases. A value without phrases is never told.
FACTS: dict[str, dict[object, tuple[str, ...]]] = {
    "light": {
        "bright": ("in bright light", "in the bright sun", "under a bright sky", "on a bright morning"),
        "dark": ("in the dark", "in dark shadows", "under a dark sky", "on a dark night"),
    },
    "tone": {
        "warm": ("in warm golden light", "on a warm summer day", "in warm colors"),
        "cold": ("in cold blue light", "on a cold winter day", "in cold colors"),
    },
    "colour": {
        True: ("in full color", "in a color picture"),
        False: ("in black and white", "in a black and white picture"),
    },
    "fog": {True: ("in thick fog", "in the fog"), False: ("in clear air",)},
    "side": {
        # Left and right are told alike: a mirrored image keeps its true caption.
        "aside": ("to one side", "at the side"),
        "middle": ("in the middle", "in the center"),
    },
    "count": {
        1: ("alone",),
        2: ("with a friend", "with one other person"),
        3: ("with two friends", "in a group of three"),
    },
    "near": {
        True: ("in a close view", "close to the camera"),
        False: ("seen from a distance", "far from the camera"),
    },
}
