"""The chronicle's Chinese: no inflection, so every template is grammatical with every word."""

# Full-width punctuation is what Chinese is written with.
# ruff: noqa: RUF001

from __future__ import annotations

from winnow.bench.tasks.example import Join
from winnow.bench.tasks.text.chronicle import Language, Relation
from winnow.bench.tasks.text.names import CHINESE_PEOPLE, CHINESE_PLACES, CHINESE_SURNAMES, listed

__all__ = ["CHINESE", "CHINESE_JOIN"]

CHINESE_JOIN = Join(
    opening="阅读下面的编年史，然后回答问题。回答要尽量简短。\n\n{context}",
    question="\n\n问题：{question}\n答案：",
    answer="{answer}",
)


TRADES = listed("铁匠 木匠 石匠 裁缝 厨师 医生 渔夫 猎人 画家 陶工 船夫 书商 药商 茶农 教师 乐师")
THINGS = listed("石桥 粮仓 书院 灯塔 水井 医馆 戏台 城墙 磨坊 驿站")
GOODS = listed("匹布 袋米 坛酒 头羊 块砖 支蜡烛 本书 斤茶叶")

CHINESE = Language(
    relations={
        "born": Relation(
            told=("{person}出生在{place}。", "{place}是{person}的出生地。", "据说{person}生于{place}。"),
            asked="{person}出生在什么地方？",
            wanted="place",
        ),
        "trade": Relation(
            told=(
                "{person}以当{trade}为生。",
                "{person}做了多年的{trade}。",
                "大家都知道{person}是个{trade}。",
            ),
            asked="{person}的职业是什么？",
            wanted="trade",
        ),
        "built": Relation(
            told=(
                "{year}年，{person}建造了{place}的{thing}。",
                "{place}的{thing}由{person}在{year}年建成。",
                "{year}年，{place}的百姓感谢{person}修成了{thing}。",
            ),
            asked="谁在{year}年建造了{place}的{thing}？",
            wanted="person",
        ),
        "bought": Relation(
            told=(
                "秋天的集市上，{person}买了{number}{goods}。",
                "账本上记着，{number}{goods}卖给了{person}。",
            ),
            asked="{person}买了多少{goods}？",
            wanted="number",
        ),
        "moved": Relation(
            told=("后来{person}全家搬到了{other}。", "{person}晚年住在{other}。"),
            asked="{person}后来搬到了什么地方？",
            wanted="other",
        ),
    },
    described="{year}年建造{place}{thing}的人",
    people=CHINESE_PEOPLE,
    values={
        "place": lambda dice: dice.pick(CHINESE_PLACES),
        "other": lambda dice: dice.pick(CHINESE_PLACES),
        "trade": lambda dice: dice.pick(TRADES),
        "thing": lambda dice: dice.pick(THINGS),
        "year": lambda dice: str(1100 + dice.below(600)),
        "number": lambda dice: str(12 + dice.below(880)),
        "goods": lambda dice: dice.pick(GOODS),
        "person": lambda dice: dice.pick(CHINESE_PEOPLE),
    },
    patterns={
        "person": rf"[{CHINESE_SURNAMES}]\w\w",
        "place": r"\w\w",
        "other": r"\w\w",
        "trade": "|".join(TRADES),
        "thing": "|".join(THINGS),
        "year": r"\d+",
        "number": r"\d+",
        "goods": "|".join(GOODS),
    },
    sentence="",
    paragraph="\n\n",
    stop="。",
)
