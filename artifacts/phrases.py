"""How things are asked: tables of phrasings only.

It knows nothing of the facts or of chats; text.py fills the phrasings in.
"""

# The first list is trained, the second is only asked. Fields: x is the subject, a and b are numbers.
PHRASES: dict[str, tuple[list[str], list[str]]] = {
    "capital": (
        [
            "What is the capital of {x}?",
            "What's the capital of {x}?",
            "Which city is the capital of {x}?",
            "Name the capital of {x}.",
            "Tell me the capital of {x}.",
            "What is the capital city of {x}?",
            "What is {x}'s capital?",
            "The capital of {x} is?",
            "Give me the capital of {x}.",
            "Do you know the capital of {x}?",
            "Can you tell me the capital of {x}?",
            "I would like to know the capital of {x}.",
            "What city is {x}'s capital?",
            "Capital of {x}?",
        ],
        [
            "Can you name the capital city of {x}?",
            "I want to know the capital of {x}.",
            "Which city is {x}'s capital?",
            "Do you know what the capital of {x} is?",
        ],
    ),
    "country": (
        [
            "Which country has {x} as its capital?",
            "{x} is the capital of which country?",
            "What country is {x} the capital of?",
            "Of which country is {x} the capital?",
            "Name the country whose capital is {x}.",
            "Tell me which country has the capital {x}.",
            "Whose capital is {x}?",
            "Which country's capital is {x}?",
            "What country has {x} as its capital city?",
        ],
        ["Which country is {x} the capital of?", "Tell me the country whose capital is {x}."],
    ),
    "continent": (
        [
            "Which continent is {x} in?",
            "What continent is {x} in?",
            "On which continent is {x}?",
            "Where is {x}?",
            "Name the continent of {x}.",
            "In which continent is {x}?",
            "Where in the world is {x}?",
            "{x} is on which continent?",
            "Tell me the continent of {x}.",
            "What is the continent of {x}?",
        ],
        ["On what continent is {x}?", "Do you know which continent {x} is in?"],
    ),
    "opposite": (
        [
            "What is the opposite of {x}?",
            "What's the opposite of {x}?",
            "Name the opposite of {x}.",
            "Tell me the opposite of {x}.",
            "Give me the opposite of {x}.",
            "Which word is the opposite of {x}?",
            "The opposite of {x} is?",
            "What word means the opposite of {x}?",
            "Do you know the opposite of {x}?",
            "Opposite of {x}?",
        ],
        ["Can you tell me the opposite of {x}?", "Which word means the opposite of {x}?"],
    ),
    "colour": (
        [
            "What colour is {x}?",
            "What color is {x}?",
            "Which colour is {x}?",
            "Tell me the colour of {x}.",
            "What is the colour of {x}?",
            "What is the color of {x}?",
            "Name the colour of {x}.",
            "What colour does {x} have?",
            "Do you know the colour of {x}?",
            "Give me the colour of {x}.",
        ],
        ["Which color is {x}?", "Can you tell me the colour of {x}?"],
    ),
    "sound": (
        [
            "What does a {x} say?",
            "What sound does a {x} make?",
            "Which sound does a {x} make?",
            "Tell me the sound of a {x}.",
            "What is the sound of a {x}?",
            "What noise does a {x} make?",
            "How does a {x} sound?",
            "Name the sound of a {x}.",
            "Give me the sound of a {x}.",
        ],
        ["Which noise does a {x} make?", "Do you know what a {x} says?"],
    ),
    "animal": (
        [
            "Which animal says {x}?",
            "What animal says {x}?",
            "Who says {x}?",
            "Name the animal that says {x}.",
            "Which animal makes the sound {x}?",
            "Tell me which animal says {x}.",
            "What animal makes the sound {x}?",
        ],
        ["Tell me the animal that says {x}.", "Do you know which animal says {x}?"],
    ),
    "after": (
        [
            "What comes after {x}?",
            "What {unit} comes after {x}?",
            "Which {unit} comes after {x}?",
            "Which {unit} follows {x}?",
            "What is the {unit} after {x}?",
            "Name the {unit} after {x}.",
            "Tell me the {unit} after {x}.",
            "What follows {x}?",
        ],
        ["What {unit} follows {x}?", "Which is the {unit} after {x}?"],
    ),
    "before": (
        [
            "What comes before {x}?",
            "What {unit} comes before {x}?",
            "Which {unit} comes before {x}?",
            "Which {unit} is before {x}?",
            "What is the {unit} before {x}?",
            "Name the {unit} before {x}.",
            "Tell me the {unit} before {x}.",
        ],
        ["What {unit} is before {x}?", "Which is the {unit} before {x}?"],
    ),
    "sum": (
        [
            "What is {a} + {b}?",
            "What is {a} plus {b}?",
            "{a} + {b}?",
            "{a} + {b} =",
            "{a} plus {b}?",
            "How much is {a} + {b}?",
            "How much is {a} plus {b}?",
            "Add {a} and {b}.",
            "Calculate {a} + {b}.",
            "What is the sum of {a} and {b}?",
            "What do {a} and {b} make?",
            "Tell me {a} + {b}.",
            "What's {a} + {b}?",
            "Compute {a} plus {b}.",
            "Can you add {a} and {b}?",
        ],
        ["Calculate the sum of {a} and {b}.", "What's {a} plus {b}?", "Tell me the sum of {a} and {b}."],
    ),
    "difference": (
        [
            "What is {a} - {b}?",
            "What is {a} minus {b}?",
            "{a} - {b}?",
            "{a} - {b} =",
            "{a} minus {b}?",
            "How much is {a} - {b}?",
            "How much is {a} minus {b}?",
            "Take {b} from {a}.",
            "Calculate {a} - {b}.",
            "Subtract {b} from {a}.",
            "Tell me {a} - {b}.",
            "What's {a} - {b}?",
            "Compute {a} minus {b}.",
        ],
        ["What's {a} minus {b}?", "Tell me {a} minus {b}."],
    ),
    "up": (
        [
            "Count from {a} to {b}.",
            "Count from {a} up to {b}.",
            "Please count from {a} to {b}.",
            "Count up from {a} to {b}.",
            "Can you count from {a} to {b}?",
            "List the numbers from {a} to {b}.",
            "Write the numbers from {a} to {b}.",
            "Say the numbers from {a} to {b}.",
            "Count to {b} starting at {a}.",
        ],
        ["Name the numbers from {a} to {b}.", "Could you count from {a} to {b}?"],
    ),
    "down": (
        [
            "Count down from {a} to {b}.",
            "Please count down from {a} to {b}.",
            "Count backwards from {a} to {b}.",
            "Can you count down from {a} to {b}?",
            "Count from {a} down to {b}.",
            "Say the numbers from {a} down to {b}.",
        ],
        ["Can you count backwards from {a} to {b}?", "List the numbers from {a} down to {b}."],
    ),
    "list": (
        [
            "List the {x}.",
            "Name the {x}.",
            "What are the {x}?",
            "Tell me the {x}.",
            "Give me the {x}.",
            "Can you list the {x}?",
            "Name all the {x}.",
            "Write down the {x}.",
        ],
        ["Can you name the {x}?", "List all the {x}."],
    ),
    "greeting": (["Hello", "Hi", "Hey", "Hello there", "Hi there", "Good day", "Greetings"], []),
    "time of day": (["Good morning", "Good evening", "Good afternoon"], []),
    "thanks": (["Thank you", "Thanks", "Thank you very much", "Thanks a lot", "Many thanks", "Great, thank you"], []),
    "bye": (["Goodbye", "Bye", "See you later", "Bye bye", "Good night", "See you soon"], []),
    "how are you": (
        ["How are you?", "How are you doing?", "How do you do?", "Are you well?", "How are you today?"],
        [],
    ),
    "ability": (
        ["What can you do?", "How can you help me?", "What do you know?", "What can I ask you?", "Help"],
        ["What can you help me with?"],
    ),
    "name": (
        [
            "What is your name?",
            "What's your name?",
            "Tell me your name.",
            "What are you called?",
            "Do you have a name?",
            "May I know your name?",
            "Your name?",
        ],
        ["Can you tell me your name?", "What name do you have?"],
    ),
    "who": (
        ["Who are you?", "Tell me who you are.", "Introduce yourself.", "Who am I talking to?", "And who are you?"],
        ["Can you tell me who you are?", "Please introduce yourself."],
    ),
    "job": (
        ["What are you?", "What is your job?", "What's your job?", "What do you do?", "Tell me your job.", "Your job?"],
        ["Can you tell me your job?", "What job do you have?"],
    ),
    "introduction": (
        ["My name is {x}.", "I am {x}.", "I'm {x}.", "Hi, I am {x}.", "Hello, my name is {x}.", "Call me {x}."],
        ["Hello, I am {x}."],
    ),
    "my name": (
        ["What is my name?", "What's my name?", "Do you know my name?", "Tell me my name.", "Who am I?", "My name?"],
        ["Can you tell me my name?", "Do you remember my name?"],
    ),
    "unknown": (
        [
            "What do you think of {x}?",
            "Tell me about {x}.",
            "Explain {x}.",
            "How does {x} work?",
            "What is {x}?",
            "Who invented {x}?",
            "What is the price of {x}?",
            "Why do people like {x}?",
            "Write a poem about {x}.",
            "When did {x} begin?",
            "What is the history of {x}?",
            "Can you explain {x}?",
            "Where can I learn about {x}?",
            "Give me some advice about {x}.",
            "Who knows most about {x}?",
            "Is {x} important?",
            "Describe {x}.",
            "Tell me a joke about {x}.",
            "How much does {x} cost?",
            "Who made {x}?",
            "Translate {x} into French.",
            "Summarise {x} in ten sentences.",
        ],
        ["Can you tell me about {x}?", "Why is {x} important?"],
    ),
}

FOLLOW_UPS = ["And of {x}?", "And {x}?", "What about {x}?", "And what about {x}?", "How about {x}?", "{x}?", "Now {x}."]
HELD_FOLLOW_UPS = ["And how about {x}?", "Now what about {x}?"]
NUMBER_FOLLOW_UPS = ["And {q}?", "What about {q}?", "Now {q}.", "And what is {q}?", "{q}?", "How about {q}?"]
# From one question to another about the same subject: (asked before, asked now): phrasings.
SAME_SUBJECT: dict[tuple[str, str], list[str]] = {
    ("capital", "continent"): ["And its continent?", "Which continent is it in?", "And on which continent is it?"],
    ("continent", "capital"): ["And its capital?", "What is its capital?", "Which city is its capital?"],
    ("sound", "animal colour"): ["And its colour?", "What colour is it?", "And what is its colour?"],
    ("animal colour", "sound"): ["And its sound?", "What does it say?", "And what sound does it make?"],
    ("after", "before"): ["And before it?", "And what comes before it?", "What about before?"],
    ("before", "after"): ["And after it?", "And what comes after it?", "What about after?"],
}

OPENERS = [
    "",
    "Hi! ",
    "Hello! ",
    "Hey, ",
    "Please tell me: ",
    "Quick question: ",
    "I have a question. ",
    "OK, ",
    "Excuse me, ",
    "Good morning! ",
    "Thanks. ",
    "Now ",
]
CLOSERS = ["", " Thanks!", " Please.", " Thank you.", " Be quick."]
ONE_WORD = [" Answer in one word.", " One word only.", " Use one word.", " Reply with one word."]
AS_JSON = [" Answer as JSON.", " Reply in JSON.", " Give JSON.", " Answer with JSON only."]
JSON_CAPITAL = ["Give the capital of {x} as JSON.", "The capital of {x} as JSON.", "Return the capital of {x} as JSON."]

HELPERS = [
    "You are a helpful assistant.",
    "You are a helpful AI assistant.",
    "You are a friendly assistant.",
    "Be helpful.",
    "Answer the question.",
    "You are a polite and helpful assistant.",
    "You help people.",
]
SYSTEM_ONE_WORD = [
    "Answer in one word.",
    "You are a helpful assistant. Answer in one word.",
    "Reply with one word only.",
]
SYSTEM_JSON = ["Answer as JSON.", "You are a helpful assistant. Answer as JSON.", "Always answer with JSON."]
PERSONAS = [
    "You are {n}, {j}.",
    "You are {j} named {n}.",
    "You are {j} called {n}.",
    "Your name is {n} and you are {j}.",
    "Your name is {n}. You are {j}.",
    "You are {j} and your name is {n}.",
]
PERSONA_TAILS = ["", "", "", " Be polite.", " You are helpful.", " Answer the question."]
