"""Words of the sample captions: common English, each nearly always one word piece of bert-base-uncased."""

from __future__ import annotations

FIRST_NAMES = [
    "John",
    "Mary",
    "David",
    "Anna",
    "James",
    "Robert",
    "Michael",
    "William",
    "George",
    "Paul",
    "Peter",
    "Thomas",
    "Charles",
    "Richard",
    "Joseph",
    "Alice",
    "Emma",
    "Laura",
    "Sarah",
    "Jane",
    "Kate",
    "Helen",
    "Lucy",
    "Martin",
    "Simon",
    "Frank",
    "Henry",
    "Jack",
    "Maria",
]
LAST_NAMES = [
    "Smith",
    "Jones",
    "Taylor",
    "Clark",
    "Lewis",
    "Walker",
    "Allen",
    "King",
    "Wright",
    "Scott",
    "Baker",
    "Adams",
    "Nelson",
    "Carter",
    "Mitchell",
    "Turner",
    "Parker",
    "Evans",
    "Collins",
    "Stewart",
    "Morris",
    "Murphy",
    "Cook",
    "Rogers",
    "Morgan",
    "Bell",
    "Cooper",
    "Ward",
    "Kelly",
    "Howard",
]
TITLES = [
    "president",
    "minister",
    "mayor",
    "actor",
    "singer",
    "player",
    "coach",
    "director",
    "writer",
    "doctor",
    "leader",
]
PLACES = [
    "the city hall",
    "the market",
    "the station",
    "the school",
    "the museum",
    "the hotel",
    "the river",
    "the park",
    "the garden",
    "the main street",
    "the old town",
    "the studio",
]
VERBS = [
    "speaks to the press",
    "stands",
    "talks to the press",
    "meets the team",
    "looks at the camera",
    "takes questions",
    "waits",
    "leaves the meeting",
    "arrives",
    "walks",
    "gives a speech",
    "watches the game",
]

# Mood words in pairs: (cheerful, gloomy). A flip replaces a word by its partner.
FEELINGS = (
    ("happy", "sad"),
    ("glad", "angry"),
    ("pleased", "upset"),
    ("excited", "worried"),
    ("proud", "afraid"),
    ("lucky", "guilty"),
)
JUDGEMENTS = (
    ("great", "terrible"),
    ("good", "bad"),
    ("beautiful", "ugly"),
    ("wonderful", "awful"),
    ("perfect", "horrible"),
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

LIGHT = {
    "bright": ("in bright light", "in the bright sun", "under a bright sky", "on a bright morning"),
    "dark": ("in the dark", "in dark shadows", "under a dark sky", "on a dark night"),
}
TONE = {
    "warm": ("in warm golden light", "on a warm summer day", "in warm colors"),
    "cold": ("in cold blue light", "on a cold winter day", "in cold colors"),
}
COLOUR = {
    True: ("in full color", "in a color picture"),
    False: ("in black and white", "in a black and white picture"),
}
FOG = {True: ("in thick fog", "in the fog"), False: ("in clear air",)}
DISTANCE = {
    True: ("in a close view", "close to the camera"),
    False: ("seen from a distance", "far from the camera"),
}
SIDE = {
    "left": ("on the left", "on the left side"),
    "middle": ("in the middle", "in the center"),
    "right": ("on the right", "on the right side"),
}
COUNT = {
    1: ("alone",),
    2: ("with a friend", "with one other person"),
    3: ("with two friends", "in a group of three"),
}
