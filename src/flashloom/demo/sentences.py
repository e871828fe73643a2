"""The sentences of the demo's similarity search: eight topics, five sentences each, and queries that share few words
with them."""

TOPICS: dict[str, tuple[str, ...]] = {
    "cooking": (
        "Simmer the lentils with cumin and garlic until they are soft.",
        "Let the bread dough rise in a warm place for two hours.",
        "A pinch of salt brings out the sweetness of ripe tomatoes.",
        "Whisk the egg whites until they hold stiff peaks.",
        "Roast the chicken at high heat so that the skin turns crisp.",
    ),
    "astronomy": (
        "The telescope recorded the faint light of a distant galaxy.",
        "Saturn's rings are made mostly of ice and dust.",
        "A solar eclipse happens when the moon passes in front of the sun.",
        "Neutron stars are the collapsed cores of massive stars.",
        "The probe sent back pictures of craters on Mercury.",
    ),
    "money": (
        "The central bank raised interest rates to slow inflation.",
        "She moved her savings into a fund that follows the whole market.",
        "The company's shares fell after it reported a quarterly loss.",
        "A fixed-rate mortgage keeps the monthly payment the same for years.",
        "They asked the bank for a loan to open a second shop.",
    ),
    "gardening": (
        "Prune the roses in late winter, before new buds appear.",
        "Earthworms loosen the soil and help the roots to breathe.",
        "Water the seedlings in the early morning to keep them from wilting.",
        "Mulch around the apple tree keeps weeds down.",
        "Slugs ate most of the young lettuce overnight.",
    ),
    "sport": (
        "The goalkeeper saved a penalty in the last minute of the match.",
        "She ran the marathon in under three hours.",
        "The cyclists climbed the final mountain pass in heavy rain.",
        "His serve won him the tennis final in straight sets.",
        "The coach replaced both strikers at half-time.",
    ),
    "computing": (
        "The program crashed because it read past the end of an array.",
        "Storing the results in a hash table made the lookup much faster.",
        "The tests passed on one machine but failed on the build server.",
        "A memory leak slowed the web server until it was restarted.",
        "The compiler turned the inner loop into vector instructions.",
    ),
    "health": (
        "The doctor told him to rest his sprained ankle for a week.",
        "Washing your hands often keeps many infections from spreading.",
        "The vaccine teaches the immune system to recognise the virus.",
        "She has trouble falling asleep when she drinks coffee late.",
        "High blood pressure often has no symptoms for many years.",
    ),
    "travel": (
        "The night train reaches the coast shortly after sunrise.",
        "We missed our connecting flight because of the storm.",
        "The small hotel overlooks the old harbour.",
        "You need a visa to stay in the country for more than a month.",
        "The ferry to the island runs twice a day in summer.",
    ),
}
QUERIES: tuple[tuple[str, str], ...] = (
    ("How do I bake a loaf at home?", "cooking"),
    ("planets and moons seen from a spacecraft", "astronomy"),
    ("borrowing funds for a small business", "money"),
    ("pests damaging vegetables in the backyard", "gardening"),
    ("a decisive moment in a football game", "sport"),
    ("debugging software that stops unexpectedly", "computing"),
    ("why can't I sleep at night?", "health"),
    ("crossing the water by boat", "travel"),
)
