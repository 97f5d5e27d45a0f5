"""The facts that the embedded model is taught: tables only.

It knows nothing of phrasings or chats; text.py makes those.
"""

EUROPE, ASIA, AFRICA = "Europe", "Asia", "Africa"
NORTH, SOUTH, OCEANIA = "North America", "South America", "Oceania"

COUNTRIES: dict[str, tuple[str, str]] = {
    "Spain": ("Madrid", EUROPE),
    "France": ("Paris", EUROPE),
    "Italy": ("Rome", EUROPE),
    "Germany": ("Berlin", EUROPE),
    "Portugal": ("Lisbon", EUROPE),
    "Greece": ("Athens", EUROPE),
    "Austria": ("Vienna", EUROPE),
    "Poland": ("Warsaw", EUROPE),
    "Hungary": ("Budapest", EUROPE),
    "Norway": ("Oslo", EUROPE),
    "Sweden": ("Stockholm", EUROPE),
    "Finland": ("Helsinki", EUROPE),
    "Denmark": ("Copenhagen", EUROPE),
    "Iceland": ("Reykjavik", EUROPE),
    "Ireland": ("Dublin", EUROPE),
    "Belgium": ("Brussels", EUROPE),
    "Romania": ("Bucharest", EUROPE),
    "Bulgaria": ("Sofia", EUROPE),
    "Serbia": ("Belgrade", EUROPE),
    "Croatia": ("Zagreb", EUROPE),
    "Slovenia": ("Ljubljana", EUROPE),
    "Slovakia": ("Bratislava", EUROPE),
    "Ukraine": ("Kyiv", EUROPE),
    "Latvia": ("Riga", EUROPE),
    "Estonia": ("Tallinn", EUROPE),
    "Lithuania": ("Vilnius", EUROPE),
    "Switzerland": ("Bern", EUROPE),
    "Albania": ("Tirana", EUROPE),
    "Japan": ("Tokyo", ASIA),
    "China": ("Beijing", ASIA),
    "India": ("New Delhi", ASIA),
    "Thailand": ("Bangkok", ASIA),
    "Vietnam": ("Hanoi", ASIA),
    "Nepal": ("Kathmandu", ASIA),
    "Mongolia": ("Ulaanbaatar", ASIA),
    "Iran": ("Tehran", ASIA),
    "Iraq": ("Baghdad", ASIA),
    "Turkey": ("Ankara", ASIA),
    "Pakistan": ("Islamabad", ASIA),
    "Lebanon": ("Beirut", ASIA),
    "Jordan": ("Amman", ASIA),
    "Oman": ("Muscat", ASIA),
    "Qatar": ("Doha", ASIA),
    "Bangladesh": ("Dhaka", ASIA),
    "Cambodia": ("Phnom Penh", ASIA),
    "Egypt": ("Cairo", AFRICA),
    "Morocco": ("Rabat", AFRICA),
    "Kenya": ("Nairobi", AFRICA),
    "Ghana": ("Accra", AFRICA),
    "Nigeria": ("Abuja", AFRICA),
    "Senegal": ("Dakar", AFRICA),
    "Ethiopia": ("Addis Ababa", AFRICA),
    "Uganda": ("Kampala", AFRICA),
    "Tunisia": ("Tunis", AFRICA),
    "Mali": ("Bamako", AFRICA),
    "Angola": ("Luanda", AFRICA),
    "Canada": ("Ottawa", NORTH),
    "Mexico": ("Mexico City", NORTH),
    "Cuba": ("Havana", NORTH),
    "Jamaica": ("Kingston", NORTH),
    "Honduras": ("Tegucigalpa", NORTH),
    "Nicaragua": ("Managua", NORTH),
    "Brazil": ("Brasilia", SOUTH),
    "Peru": ("Lima", SOUTH),
    "Chile": ("Santiago", SOUTH),
    "Argentina": ("Buenos Aires", SOUTH),
    "Colombia": ("Bogota", SOUTH),
    "Ecuador": ("Quito", SOUTH),
    "Uruguay": ("Montevideo", SOUTH),
    "Paraguay": ("Asuncion", SOUTH),
    "Venezuela": ("Caracas", SOUTH),
    "Australia": ("Canberra", OCEANIA),
    "New Zealand": ("Wellington", OCEANIA),
    "Fiji": ("Suva", OCEANIA),
}

_OPPOSITE_PAIRS = """
hot cold|big small|tall short|fast slow|old new|happy sad|light dark|day night|good bad|early late|open closed
full empty|wet dry|hard soft|strong weak|rich poor|loud quiet|high low|near far|up down|left right|black white
clean dirty|true false|first last|thick thin|alive dead|inside outside|above below|before after|noisy silent
easy difficult|brave cowardly|sweet bitter|wide narrow|deep shallow|always never|push pull|give take|buy sell
win lose|love hate|start stop|smooth rough|sharp blunt|north south|east west|summer winter|friend enemy|yes no
""".replace("\n", "|")
OPPOSITES: dict[str, str] = {}
for _pair in filter(None, _OPPOSITE_PAIRS.split("|")):
    _left, _right = _pair.split()
    OPPOSITES[_left] = _right
    OPPOSITES[_right] = _left

COLOURS: dict[str, str] = {
    "grass": "green",
    "snow": "white",
    "the sky": "blue",
    "blood": "red",
    "a banana": "yellow",
    "coal": "black",
    "milk": "white",
    "a lemon": "yellow",
    "a tomato": "red",
    "a carrot": "orange",
    "chocolate": "brown",
    "the sun": "yellow",
    "the sea": "blue",
    "a cherry": "red",
    "a pumpkin": "orange",
    "ash": "grey",
    "a flamingo": "pink",
    "a plum": "purple",
    "a cucumber": "green",
    "salt": "white",
    "spinach": "green",
    "a strawberry": "red",
    "wood": "brown",
    "cotton": "white",
    "tar": "black",
    "an eggplant": "purple",
    "gold": "yellow",
    "a pea": "green",
    "a leaf": "green",
    "a sapphire": "blue",
}

# animal: sound, colour
ANIMALS: dict[str, tuple[str, str]] = {
    "cow": ("moo", "brown"),
    "dog": ("woof", "brown"),
    "cat": ("meow", "black"),
    "duck": ("quack", "yellow"),
    "pig": ("oink", "pink"),
    "sheep": ("baa", "white"),
    "horse": ("neigh", "brown"),
    "lion": ("roar", "yellow"),
    "frog": ("croak", "green"),
    "owl": ("hoot", "brown"),
    "bee": ("buzz", "yellow"),
    "snake": ("hiss", "green"),
    "mouse": ("squeak", "grey"),
    "rooster": ("cock-a-doodle-doo", "red"),
    "crow": ("caw", "black"),
    "wolf": ("howl", "grey"),
    "turkey bird": ("gobble", "brown"),
    "pigeon": ("coo", "grey"),
    "donkey": ("hee-haw", "grey"),
    "chick": ("cheep", "yellow"),
}

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]

LISTS: dict[str, list[str]] = {
    "days of the week": DAYS,
    "months of the year": MONTHS,
    "continents": [AFRICA, ASIA, EUROPE, NORTH, SOUTH, OCEANIA],
    "letters of the alphabet": list("abcdefghijklmnopqrstuvwxyz"),
    "colours of the rainbow": ["red", "orange", "yellow", "green", "blue", "indigo", "violet"],
    "seasons": ["spring", "summer", "autumn", "winter"],
}

NAMES = [
    "Rosa",
    "Anna",
    "Tom",
    "Lucy",
    "Peter",
    "Maria",
    "Jack",
    "Emma",
    "Leo",
    "Nora",
    "Max",
    "Clara",
    "Hugo",
    "Alice",
    "Oscar",
    "Ruby",
    "Felix",
    "Ivy",
    "Sam",
    "Mona",
    "Bruno",
    "Julia",
    "Otto",
    "Stella",
    "Finn",
    "Diana",
    "Marco",
    "Eva",
    "Victor",
    "Sara",
    "Paul",
    "Lena",
    "Adam",
    "Greta",
    "Karl",
    "Nina",
    "Omar",
    "Lily",
    "Ravi",
    "Mei",
]

JOBS = [
    "pirate",
    "cook",
    "doctor",
    "teacher",
    "farmer",
    "sailor",
    "baker",
    "painter",
    "singer",
    "dancer",
    "gardener",
    "pilot",
    "nurse",
    "poet",
    "wizard",
    "knight",
    "robot",
    "librarian",
    "detective",
    "carpenter",
    "fisherman",
    "astronaut",
    "clown",
    "driver",
    "lawyer",
]

# Places and words that do not exist, for "I do not know."
FICTION = [
    "Atlantis",
    "Narnia",
    "Wakanda",
    "Mordor",
    "Zorbia",
    "Blendar",
    "Oz",
    "Gondor",
    "Lilliput",
    "Utopia",
    "Genovia",
    "Avalon",
    "Camelot",
    "Krypton",
    "Westeros",
    "Freedonia",
    "Ruritania",
    "Elbonia",
    "Panem",
    "Shangri-La",
]

# Things nobody taught the model about, for "I do not know."
STRANGE = """
quantum physics|the stock market|the moon|football|Hamlet|the piano|love|the weather|bitcoin|cheese|a mortgage|history
music|the internet|Shakespeare|Mozart|a computer|democracy|gravity|the pyramids|the news|my car|this city|the economy
dinosaurs|chess|yoga|the Olympics|poetry|a rainbow|taxes|evolution|electricity|a black hole|philosophy|the ocean
the meaning of life|a good film|the lottery|my future|black tea|a bicycle|the Eiffel Tower|a phone|medicine|wine|tennis
a volcano|the election|software|Python|Linux|steel|coffee|bread|a novel|the universe|an atom|the train|a passport
"""
STRANGE_THINGS = [thing for thing in STRANGE.replace("\n", "|").split("|") if thing]
