"""Names of people, places and things, in two scripts."""

from __future__ import annotations

from itertools import product

__all__ = [
    "CHINESE_PEOPLE",
    "CHINESE_PLACES",
    "CHINESE_SURNAMES",
    "ENGLISH_PEOPLE",
    "ENGLISH_PLACES",
    "ENGLISH_TOWNS",
    "listed",
]


def listed(text: str, separator: str = " ") -> tuple[str, ...]:
    """The words of a text, or what stands between other separators."""
    return tuple(text.split(separator))


def _compose(firsts: str, seconds: str) -> tuple[str, ...]:
    """All pairs of beginnings and endings that give different names."""
    return tuple(dict.fromkeys(a + b for a, b in product(firsts.split(), seconds.split())))


_GIVEN = _compose(
    "Al Ber Cor Dar Ed Fen Gar Hal Is Jor Kel Lin Mar Nor Os Per Quil Ros Sel Tam Ul Ver Wil Yor",
    "a en ia ic in is on or wen win eth mund",
)
_FAMILY = _compose(
    "Ash Birch Clay Dove Elm Flint Glen Hart Iron Kings Lark Mill North Oak Pike Quarry Reed Stone "
    "Thorn Under Wolf Yew",
    "by combe cote field ford gate hurst man ridge smith ston worth",
)
#: given and family names
ENGLISH_PEOPLE = tuple(map(" ".join, product(_GIVEN, _FAMILY)))
ENGLISH_TOWNS = _compose(
    "Am Bal Bran Brin Cal Cold Dun East Fal Far Gold Grim Hazel Hol Kil Lam Long Mal Mir Nether Ost "
    "Pen Ra Red Sal Sand Silver Stan Sten Swan Tar Thel Tor Up Var Wend West Whit Win Wool",
    "borough brook bury cliff den fell grave ham haven holm ley mere moor mouth pool port stead ton "
    "vale wick wold",
)
_SIDES = ("Great", "Little", "New", "Old", "Upper", "Lower")
_RIVERS = ("Arn", "Dwyle", "Isk", "Leth", "Orme", "Tave")
#: towns, and their neighbours of the same name
ENGLISH_PLACES = (
    *ENGLISH_TOWNS,
    *(f"{side} {town}" for side, town in product(_SIDES, ENGLISH_TOWNS)),
    *(f"{town}-on-{river}" for town, river in product(ENGLISH_TOWNS, _RIVERS)),
    *(f"{side} {town}-on-{river}" for side, town, river in product(_SIDES, ENGLISH_TOWNS, _RIVERS)),
)

CHINESE_SURNAMES = "赵钱孙李周吴郑王冯陈褚卫蒋沈韩杨朱秦尤许何吕施张孔曹严华金魏陶姜"
_FIRST = "安博承德恩方广浩嘉建景克兰礼明宁启荣思泰维兴永正"
_SECOND = "平山石水田文武晓星秀雅毅玉远志中舟林海峰春冬光和吉康良民松桐桦桥桢柏梅楠榕"
CHINESE_PEOPLE = tuple(map("".join, product(CHINESE_SURNAMES, _FIRST, _SECOND)))
CHINESE_PLACES = tuple(
    map("".join, product("青白金银南北东西上下云石清龙凤长", "溪州川城山湖河桥湾原岭陵泉浦谷坡"))
)
