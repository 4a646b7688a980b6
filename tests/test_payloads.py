"""Texts to be worked on are never matched by meaning, nor are questions of two languages; real questions still are."""

import uuid
from typing import NamedTuple

import pytest
from caches import Same
from langchain_core.load import dumps
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.outputs import ChatGeneration

from langchain_aegis import AegisSemanticCache, aegis_scope, was_cached

MODEL = "[('_type', 'chat'), ('model', 'm'), ('stop', None)]"


EXACT_ONLY = {"not_a_question", "action", "volatile", "no_question", "several_labels"}


@pytest.fixture(scope="module")
def lookups():
    """What the cache said about its lookups, in their order."""
    return []


@pytest.fixture(scope="module")
def cache(redis_url, lookups):
    with AegisSemanticCache(
        redis_url, Same(), namespace=f"w{uuid.uuid4().hex[:8]}", op_budget_s=10, embed_budget_s=30,
        require_tenant=False, on_lookup=lookups.append,
    ) as made:  # fmt: skip
        yield made


def put(cache, *messages):
    answer = AIMessage("the first one's answer", response_metadata={"done_reason": "stop"})
    cache.update(dumps(list(messages)), MODEL, [ChatGeneration(message=answer)])


def tier(cache, *messages):
    """Return the tier that answers, or None."""
    found = cache.lookup(dumps(list(messages)), MODEL)
    return None if found is None else was_cached(found[0].message)["tier"]


class Task(NamedTuple):
    """A task, as system prompts and as messages say it, and pairs of near texts whose results differ."""

    system: tuple[str, ...]
    human: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]


# Written for this test: none of it stands in the package's data.
TASKS = {
    "translate, English": Task(
        ("You are a professional translator. Translate what the user writes into French.",
         "Translate the user's message to German. Output only the translation."),
        ("Translate into French: {}", "Please translate the following text to German:\n\n{}",
         "How do you say this in Spanish? {}", "{}\n\nTranslate this to Italian."),
        (("Where is the station?", "Where's the train station?"), ("Can I have the bill?", "Could I have the bill?"),
         ("What time does the shop open?", "At what time does the shop open?"), ("He is late.", "He was late.")),
    ),
    "translate, German": Task(
        ("Du bist Übersetzer. Übersetze die Nachricht des Nutzers ins Englische.",
         "Übertrage den folgenden Text ins Französische und gib nur die Übersetzung aus."),
        ("Übersetze ins Englische: {}", "Bitte übersetze den folgenden Text ins Spanische:\n\n{}",
         "Was heißt das auf Englisch? {}", "{}\n\nÜbersetze das bitte ins Italienische."),
        (("Wo ist der Bahnhof?", "Wo liegt der Bahnhof?"), ("Kann ich die Rechnung haben?", "Kann ich zahlen?"),
         ("Wann macht der Laden auf?", "Wann öffnet der Laden?"), ("Er kommt zu spät.", "Er kam zu spät.")),
    ),
    "correct, English": Task(
        ("Correct the grammar of the user's sentence and return only the corrected sentence.",
         "You are a proofreader. Fix spelling and punctuation, change nothing else."),
        ("Correct the grammar: {}", "Fix the mistakes in this sentence:\n{}", "Proofread this: {}",
         "Is there a spelling mistake in the following sentence?\n\n{}"),
        (("What do he want?", "What does he want?"), ("Where is you going?", "Where are you going?"),
         ("She dont like it.", "She doesn't like it."), ("Who's book is this?", "Whose book is this?")),
    ),
    "correct, German": Task(
        ("Korrigiere die Grammatik des Satzes und gib nur den korrigierten Satz zurück.",
         "Du bist Lektorin. Verbessere Rechtschreibung und Zeichensetzung."),
        ("Korrigiere die Grammatik: {}", "Verbessere die Fehler in diesem Satz:\n{}", "Bitte Korrektur lesen: {}",
         "Prüfe die Rechtschreibung:\n\n{}"),
        (("Wem gehört das Buch von?", "Wem gehört das Buch?"), ("Wo gehst du hin gehen?", "Wo gehst du hin?"),
         ("Er hat keine Zeit gehabt.", "Er hatte kein Zeit."),
         ("Wegen dem Regen blieb ich.", "Wegen des Regens blieb ich.")),
    ),
    "rewrite, English": Task(
        ("Rewrite the user's text in a formal tone.", "Rephrase what the user says so that it sounds friendlier."),
        ("Rewrite this more politely: {}", "Paraphrase the following:\n\n{}", "Make this sound more formal: {}",
         "Can you rephrase this for a customer? {}"),
        (("When will you pay us?", "When do you pay us?"), ("Why is it late again?", "Why is it late?"),
         ("Send it now.", "Send it right now."), ("What's up with the invoice?", "What about the invoice?")),
    ),
    "rewrite, German": Task(
        ("Formuliere den Text des Nutzers höflicher um.", "Schreibe die Nachricht in förmlichem Stil neu."),
        ("Formuliere das höflicher: {}", "Schreibe den folgenden Satz um:\n\n{}", "Umschreiben: {}",
         "Kannst du das freundlicher formulieren? {}"),
        (("Wann zahlt ihr endlich?", "Wann zahlt ihr?"),
         ("Warum ist das schon wieder zu spät?", "Warum ist das zu spät?"),
         ("Schick es jetzt.", "Schick es sofort."), ("Was ist mit der Rechnung?", "Was ist denn mit der Rechnung?")),
    ),
    "summarise, English": Task(
        ("Summarize the user's text in one sentence.", "You summarise support tickets. Answer with a short headline."),
        ("Summarize: {}", "Give me a summary of this text:\n\n{}", "TL;DR of the following message?\n\n{}"),
        (("The printer jams. Who can fix it?", "The printer jams often. Who can fix it?"),
         ("We met on Monday. What shall we do next?", "We met Monday. What should we do next?"),
         ("Sales rose in May and fell in June.", "Sales fell in May and rose in June.")),
    ),
    "summarise, German": Task(
        ("Fasse den Text des Nutzers in einem Satz zusammen.",
         "Du fasst Support-Tickets als kurze Überschrift zusammen."),
        ("Fasse zusammen: {}", "Gib mir eine Zusammenfassung dieses Textes:\n\n{}",
         "Kannst du das zusammenfassen?\n\n{}"),
        (("Der Drucker klemmt. Wer kann ihn reparieren?", "Der Drucker klemmt oft. Wer repariert ihn?"),
         ("Wir trafen uns am Montag. Was tun wir nun?", "Wir trafen uns Montag. Was machen wir nun?"),
         ("Der Umsatz stieg im Mai und fiel im Juni.", "Der Umsatz fiel im Mai und stieg im Juni."),
         ("Anna hat Ben geholfen.", "Ben hat Anna geholfen.")),
    ),
    "classify, English": Task(
        ("Classify the sentiment of the user's message as positive, neutral or negative.",
         "Label each ticket with one of: billing, technical, other. Reply with the label only."),
        ("Classify the sentiment: {}", "Is the following review positive or negative?\n\n{}",
         "Which category does this ticket belong to: billing, technical, other?\n\n{}"),
        (("Why is this so slow?", "Why is this so fast?"), ("How could you do that?", "How did you do that?"),
         ("I love waiting.", "I loved waiting."), ("Where's my money?", "Where is all my money?")),
    ),
    "classify, German": Task(
        ("Klassifiziere die Stimmung der Nachricht als positiv, neutral oder negativ.",
         "Ordne jedes Ticket einer Kategorie zu: Abrechnung, Technik, Sonstiges."),
        ("Klassifiziere die Stimmung: {}", "Ist die folgende Bewertung positiv oder negativ?\n\n{}",
         "In welche Kategorie gehört dieses Ticket: Abrechnung, Technik, Sonstiges?\n\n{}"),
        (("Warum ist das so langsam?", "Warum ist das so schnell?"),
         ("Wie konntet ihr das tun?", "Wie habt ihr das gemacht?"),
         ("Das war ja toll.", "Das war echt toll."), ("Wo bleibt mein Geld?", "Wo ist mein Geld?")),
    ),
    "extract, English": Task(
        ("Extract all names and dates from the user's text as JSON.",
         "Your job is to extract the product that the customer asks about."),
        ("Extract the product name: {}", "List all places that are mentioned in this text:\n\n{}",
         "Which entities are mentioned in the following sentence?\n\n{}"),
        (("When does Anna arrive in Rome?", "When does Ana arrive in Rome?"),
         ("Can I return the blue kettle?", "Can I return the kettle?"),
         ("Where can Tom meet Sue?", "Where can Sue meet Tom?")),
    ),
    "extract, German": Task(
        ("Extrahiere alle Namen und Daten aus dem Text des Nutzers als JSON.",
         "Deine Aufgabe ist es, das Produkt zu extrahieren, nach dem der Kunde fragt."),
        ("Extrahiere den Produktnamen: {}", "Liste alle Orte auf, die in diesem Text vorkommen:\n\n{}",
         "Welche Namen kommen im folgenden Satz vor?\n\n{}"),
        (("Wann kommt Anna in Rom an?", "Wann kommt Ana in Rom an?"),
         ("Kann ich den blauen Kessel zurückgeben?", "Kann ich den Kessel zurückgeben?"),
         ("Wo trifft Tom Susanne?", "Wo trifft Susanne Tom?"),
         ("Wer hat den Topf bestellt?", "Wer bestellte den Topf?")),
    ),
    "code, English": Task(
        ("You write Python functions. Reply with code only.", "Generate TypeScript code for what the user describes."),
        ("Write a Python function for this: {}", "Implement the following in Go:\n\n{}",
         "Write a unit test for this: {}",
         "What does this code print?\n\n{}"),
        (("How do I sort a list ascending?", "How do I sort a list descending?"),
         ("Can it read a file line by line?", "Can it read a file byte by byte?"),
         ("print(sum([1, 2, 3]))", "print(max([1, 2, 3]))"), ("Reverse a string.", "Reverse a list.")),
    ),
    "code, German": Task(
        ("Du schreibst Python-Funktionen. Antworte nur mit Code.",
         "Erzeuge Java-Code für das, was der Nutzer beschreibt."),
        ("Schreibe eine Python-Funktion dafür: {}", "Implementiere das Folgende in Go:\n\n{}",
         "Schreibe einen Unit-Test dafür: {}", "Was gibt dieser Code aus?\n\n{}"),
        (("Wie sortiere ich eine Liste aufsteigend?", "Wie sortiere ich eine Liste absteigend?"),
         ("Kann man eine Datei zeilenweise lesen?", "Kann man eine Datei byteweise lesen?"),
         ("print(len('ab'))", "print(len('abc'))"), ("Kehre einen Text um.", "Kehre eine Liste um.")),
    ),
    "SQL, English": Task(
        ("Turn the user's question into a SQL query for the table orders(id, customer, city, total).",
         "You are a text-to-SQL assistant. Write one SELECT statement, nothing else."),
        ("Write a SQL query: {}", "Convert this question to SQL:\n\n{}", "Generate the SQL for this: {}"),
        (("How many customers live in Berlin?", "How many clients live in Berlin?"),
         ("Which orders are above the average?", "Which orders are below the average?"),
         ("SELECT id FROM orders WHERE total > 5", "SELECT id FROM orders WHERE total >= 5")),
    ),
    "SQL, German": Task(
        ("Mache aus der Frage des Nutzers eine SQL-Abfrage für die Tabelle orders(id, customer, city, total).",
         "Du bist ein Text-zu-SQL-Assistent. Schreibe genau eine SELECT-Anweisung."),
        ("Schreibe eine SQL-Abfrage: {}", "Wandle diese Frage in SQL um:\n\n{}", "Erzeuge das SQL dafür: {}"),
        (("Wie viele Kunden wohnen in Berlin?", "Wie viele Kunden leben in Berlin?"),
         ("Welche Bestellungen liegen über dem Schnitt?", "Welche Bestellungen liegen unter dem Schnitt?"),
         ("Welcher Kunde zahlt am meisten?", "Welcher Kunde bestellt am meisten?")),
    ),
}  # fmt: skip


def test_there_are_60_pairs_over_eight_tasks_in_two_languages():
    assert sum(len(task.pairs) for task in TASKS.values()) == 60
    assert len({name.split(",")[0] for name in TASKS}) == 8
    assert all(first != second for task in TASKS.values() for first, second in task.pairs)


def prompts(where, text, task, number):
    """Return the prompt that asks for the task on `text`; the wording changes from pair to pair."""
    if where == "in the message":
        return [HumanMessage(task.human[number % len(task.human)].format(text))]
    system = SystemMessage(task.system[number % len(task.system)])
    if where == "in the system prompt":
        return [system, HumanMessage(text)]
    if where == "in the system prompt, labelled":
        return [system, HumanMessage(f"Question: {text}")]
    return [HumanMessage(f"{system.content}\n\nQuestion: {text}\n\nAnswer:")]


PLACES = ("in the system prompt", "in the message", "in the system prompt, labelled", "before a label")


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("name", TASKS)
def test_no_text_to_be_worked_on_is_answered_by_meaning(cache, lookups, name, where):
    """Not even by a near text: "What do he want?" and "What does he want?" have different corrections."""
    task, served, considered = TASKS[name], [], []
    for number, (first, second) in enumerate(task.pairs):
        before, again = (prompts(where, text, task, number) for text in (first, second))
        put(cache, *before)
        assert tier(cache, *before) == "exact"
        if tier(cache, *again) is not None:
            served.append((before[-1].content, again[-1].content))
        if lookups[-1].candidates or not set(lookups[-1].reasons) & EXACT_ONLY:
            considered.append((again[-1].content, lookups[-1].reasons))
    assert (served, considered) == ([], [])


# -- questions in two languages

TRANSLATIONS = [
    ("Why?", "Warum?"),
    ("How much?", "Wie viel?"),
    ("Who pays?", "Wer zahlt?"),
    ("What is a proxy?", "Was ist ein Proxy?"),
    ("Where is the router?", "Wo ist der Router?"),
    ("Is the service online?", "Ist der Service online?"),
    ("Can I test the app?", "Kann ich die App testen?"),
    ("What costs a license?", "Was kostet eine Lizenz?"),
    ("Is WLAN free in the hotel?", "Ist das WLAN im Hotel gratis?"),
    ("Which model is new?", "Welches Modell ist neu?"),
    ("How old is the hotel?", "Wie alt ist das Hotel?"),
    ("Who is the manager of the team?", "Wer ist der Manager des Teams?"),
    ("What is the capital of Portugal?", "Was ist die Hauptstadt von Portugal?"),
    ("How do I reset my password?", "Wie setze ich mein Passwort zurück?"),
    ("Where can I park my car?", "Wo kann ich mein Auto parken?"),
    ("When does the library open?", "Wann öffnet die Bibliothek?"),
    ("May I bring my dog?", "Darf ich meinen Hund mitbringen?"),
    ("How do I cancel my subscription?", "Wie kündige ich mein Abonnement?"),
    ("Do you ship to Austria?", "Liefern Sie nach Österreich?"),
    ("What is the difference between RAM and ROM?", "Was ist der Unterschied zwischen RAM und ROM?"),
    ("Does the phone support USB-C?", "Unterstützt das Telefon USB-C?"),
    ("How long is the warranty?", "Wie lange gilt die Garantie?"),
    ("Who wrote Faust?", "Wer schrieb Faust?"),
    ("Which documents do I need?", "Welche Dokumente brauche ich?"),
    ("Can I pay with PayPal?", "Kann ich mit PayPal zahlen?"),
    ("How do I install Docker on Linux?", "Wie installiere ich Docker auf Linux?"),
    ("Explain DNS.", "Erkläre DNS."),
    ("Is Kafka a database?", "Ist Kafka eine Datenbank?"),
    ("What does VAT mean?", "Was bedeutet VAT?"),
    ("Are there discounts for students?", "Gibt es Rabatte für Studenten?"),
]


@pytest.mark.parametrize("order", ["English first", "German first"])
@pytest.mark.parametrize("form", ["bare", "in a RAG prompt"])
def test_a_question_in_another_language_gets_no_answer_in_this_one(cache, form, order):
    assert len(TRANSLATIONS) == 30
    served = []
    for pair in TRANSLATIONS:
        first, second = pair if order == "English first" else pair[::-1]
        wrap = rag if form == "in a RAG prompt" else lambda text: HumanMessage(f"{text} ")
        with aegis_scope(tenant=uuid.uuid4().hex):
            put(cache, wrap(first))
            if tier(cache, wrap(second)) is not None:
                served.append((first, second))
    assert served == []


# -- real questions

QUESTIONS = [
    "How long may I keep a book?",
    "What is the fine for a late return?",
    "Where do I find the opening hours?",
    "Which branch has a children's corner?",
    "Who can apply for a reader card?",
    "Can I reserve a film that is on loan?",
    "What happens if I lose my card?",
    "How do I extend a loan?",
    "Is there a lift in the main building?",
    "Are dogs allowed in the reading room?",
    "Does the annual fee include e-books?",
    "Why was my reservation cancelled?",
    "How can I change my password?",
    "What documents do I need to register?",
    "What does interlibrary loan mean?",
    "Do students pay a lower fee?",
    "How many books can I borrow at once?",
    "Which payment methods are accepted?",
    "Where is the nearest book drop?",
    "Can somebody else collect my books?",
    "What is the Wi-Fi password policy?",
    "How is my personal data stored?",
    "Who do I contact about a damaged book?",
    "Is it possible to donate books?",
    "How do I print from my phone?",
    "Wie lange darf ich ein Buch behalten?",
    "Was kostet ein verspätetes Buch?",
    "Wo finde ich die Öffnungszeiten?",
    "Welche Filiale hat eine Kinderecke?",
    "Wer kann einen Ausweis beantragen?",
    "Kann ich einen verliehenen Film vormerken?",
    "Was passiert, wenn ich meinen Ausweis verliere?",
    "Wie verlängere ich eine Ausleihe?",
    "Gibt es im Haupthaus einen Aufzug?",
    "Sind Hunde im Lesesaal erlaubt?",
    "Warum wurde meine Vormerkung gelöscht?",
    "Wie viele Bücher kann ich gleichzeitig ausleihen?",
    "Welche Zahlungsarten werden angenommen?",
    "Darf ich Essen mitbringen?",
    "Wie werden meine Daten gespeichert?",
]
CHANGES = {
    "a space before the mark": lambda text: f"{text[:-1]} {text[-1]}",
    "a second mark": lambda text: f"{text}?",
    "no capital": lambda text: f"{text[0].lower()}{text[1:]}",
    "two spaces": lambda text: text.replace(" ", "  ", 1),
}


def rag(question):
    return HumanMessage(
        "Answer the question in one short sentence, with the words of the context.\n\nContext:\nBooks may be kept for "
        f"28 days. The fine is 20 cents a day.\nThe desk is open from 10:00.\n\nQuestion: {question}\n\nAnswer:"
    )


@pytest.mark.parametrize("form", ["RAG prompt", "system prompt and question", "bare"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_real_question_that_is_written_a_little_differently_is_a_hit(cache, change, form):
    """So that the rules above are more than "never"."""
    assert len(QUESTIONS) == 40
    missed = []
    for question in QUESTIONS:
        wrap = rag if form == "RAG prompt" else HumanMessage
        before = [] if form == "bare" else [SystemMessage("You help the readers of a library.")]
        with aegis_scope(tenant=uuid.uuid4().hex):
            put(cache, *before, wrap(question))
            if tier(cache, *before, wrap(CHANGES[change](question))) != "semantic":
                missed.append(question)
    assert missed == []


SETS_NO_TASK = [
    "You are a helpful assistant.",
    "Be brief.",
    "You are Max, the friendly bot of ACME.",
    "Please respond in a friendly tone.",
    "Never mention competitors. If you do not know the answer, say so.",
    "You are a SQL expert. Answer questions about SQL.",
    "You are an expert in tax law with 20 years of experience.",
    "Answer in German.",
    "Use the following context to answer.\n\nACME was founded in 1920 and sells kettles.",
    "You are a customer service agent of a bank. Help customers with their questions.",
    "Du bist ein hilfreicher Assistent.",
    "Antworte knapp und nur auf Deutsch.",
    "Du hilfst den Kunden einer Bank. Nenne keine Konkurrenten.",
    "Beantworte Fragen zum Arbeitsrecht anhand des Kontexts.",
]


TOO_STRICT = pytest.mark.xfail(strict=True, reason="taken for the order to work on a text")
HELD_BACK = ("You are a SQL expert",)


@pytest.mark.parametrize(
    "system", [pytest.param(s, marks=TOO_STRICT if s.startswith(HELD_BACK) else ()) for s in SETS_NO_TASK]
)
def test_a_system_prompt_that_sets_no_task_leaves_questions_alone(cache, system):
    for question in ("How long may I keep a book?", "Wie lange darf ich ein Buch behalten?"):
        put(cache, SystemMessage(system), HumanMessage(question))
        assert tier(cache, SystemMessage(system), HumanMessage(f"{question[:-1]} ?")) == "semantic"
