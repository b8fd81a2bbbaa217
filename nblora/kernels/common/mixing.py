"""Constants of `SplitMix64` (Steele et al., 2014), by which attention says what it drops."""

FIRST_MIX, SECOND_MIX = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
KEY_STEP, ROW_STEP, HEAD_STEP = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95, 0xAF251AF3B0F025B5
"""How far the next key, row and head are from one: odd, so that no two places of a step meet."""
