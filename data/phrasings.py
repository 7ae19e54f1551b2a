"""How customers put things in the training rows (held-out rows use data/held_out_phrasings.py).

Slots: {items} (what it is about), {name}, {city}. A line with all three can stand alone; the others are combined.
"""

from dataclasses import dataclass

Lines = tuple[str, ...]


@dataclass(frozen=True)
class Phrasings:
    """One side (training or held-out) of everything a message is put together from."""

    openers: Lines
    introductions: Lines
    signatures: Lines
    bodies: dict[str, Lines]
    whole: dict[str, Lines]
    urgency: dict[str, Lines]
    fillers: Lines


def _lines(text: str) -> Lines:
    return tuple(line.strip() for line in " ".join(text.split()).split("|"))


TRAIN = Phrasings(
    openers=_lines(
        """
        Hi! | Hello, | Hey there, | Good morning. | Good evening, | Dear shop, | Dear team, | Hi team, | Hello again!
        | Good day, | To whom it may concern: | Hey! | Hi folks, | Morning! | Dear Sir or Madam, | Hi there. | Hello
        shop,
        """
    ),
    introductions=(
        "I'm {name} from {city}.",
        "This is {name} in {city}.",
        "My name is {name} and I live in {city}.",
        "{name} here, from {city}.",
        "{name} from {city} writing.",
        "It's {name}, {city}.",
        "Name: {name}, city: {city}.",
        "Customer {name}, {city}.",
        "I am {name} and my home is {city}.",
        "I live in {city}, my name is {name}.",
        "Greetings from {city}, {name} here.",
        "{city} calling, this is {name}.",
        "We are in {city}; ask for {name}.",
        "The account is under {name}, {city}.",
        "I'm writing from {city}, name's {name}.",
        "my name is {name}, i'm in {city}.",
        "You know me, {name} from {city}.",
        "{name} ({city}) here.",
        "I am called {name}, I moved to {city} lately.",
        "Here is {name}, your customer in {city}.",
        "I'm {name}, a student in {city}.",
        "We run a small cafe in {city}, I'm {name}.",
        "{name}, {city}.",
        "{city} - {name}.",
    ),
    signatures=(
        "{name}, {city}",
        "Regards, {name}, {city}",
        "Best, {name} from {city}",
        "Thanks, {name} ({city})",
        "Yours, {name} in {city}",
        "- {name}, {city}",
        "Kind regards from {city}, {name}",
        "Sincerely, {name} / {city}",
        "Thank you! {name}, {city}",
        "Bye, {name} from {city}",
        "{name} | {city}",
        "Love from {city}, {name}",
        "Signed: {name}, {city}",
        "thx, {name} in {city}",
        "Best regards, {name}, {city}",
        "Sent by {name} from {city}",
        "Yours sincerely, {name}. {city}",
        "See you, {name} ({city})",
        "{name} from {city}",
        "{name} in {city}",
        "Customer: {name}. City: {city}.",
    ),
    bodies={
        "order": (
            "I'd like to order {items}.",
            "Please send me {items}.",
            "Can I buy {items}?",
            "I want to buy {items}.",
            "I need {items}.",
            "We'd like {items}, please.",
            "Could you ship {items} to my address?",
            "I would like to purchase {items}.",
            "I'll take {items}.",
            "Put me down for {items}.",
            "Could I get {items}?",
            "Do you have {items}? I'd buy that.",
            "New order: {items}.",
            "pls send {items}.",
            "I'm looking for {items}, please add to my basket.",
            "Order {items} for me, please.",
            "May I have {items} delivered?",
            "My shopping list: {items}.",
            "Add {items} to a new order.",
            "I am going to need {items}.",
            "I've decided to get {items}.",
            "We are moving house and want {items}.",
            "Let me have {items}.",
            "Ship me {items}.",
            "Our office needs {items}.",
            "Please book {items} for me.",
            "I saw {items} on your website and would love to have that.",
            "Send {items} my way, please.",
            "A friend has a birthday, so I'd like {items} gift-wrapped.",
            "I am ready to pay for {items}.",
            "How much is {items}? I'll take it.",
            "Please charge my card for {items}.",
            "We ran out, so {items} again, please.",
            "Could you sell us {items}?",
        ),
        "return": (
            "I'd like to return {items}.",
            "I want to send back {items}.",
            "Can I return {items}?",
            "I am returning {items}.",
            "How do I send {items} back?",
            "Please give me a return label for {items}.",
            "I want my money back for {items}, unused.",
            "I'd like a refund for {items}, still in the box.",
            "{items} did not suit me, I'll send everything back.",
            "Please pick up {items} again, I'm not keeping that.",
            "Return, please: {items}.",
            "I changed my mind after delivery of {items}, please take back.",
            "Would you take back {items}?",
            "I bought too much and want to return {items}.",
            "Wrong size for me: {items}. I'd like to return that.",
            "want to give back {items}, never used.",
            "We must send {items} back to you.",
            "Is it possible to exchange {items} for a refund?",
            "I'm bringing back {items}.",
            "Return request for {items}.",
            "I have {items} to return.",
            "It's the wrong colour, so I have to send back {items}.",
            "Please arrange a return for {items}.",
            "{items} should go back to you for a refund.",
            "My wife dislikes {items}, may we return it all?",
            "I won't keep {items}, how can I return that?",
            "Too small for us: {items}. We are sending that back.",
            "The return parcel holds {items}.",
            "I got {items} as a gift but want to give it back for cash.",
            "Take {items} back and refund me.",
            "Please refund {items}, the parcel is on its way back.",
            "Whats your return policy for {items}? I want to send it back.",
        ),
        "cancel": (
            "Please cancel my order of {items}.",
            "I want to cancel {items}.",
            "Cancel {items}, please.",
            "I no longer need {items}, please cancel.",
            "Can you stop my order for {items}?",
            "Please don't send {items}, I changed my mind.",
            "I'd like to cancel the order with {items}.",
            "Take {items} off my order.",
            "Please remove {items} from my order.",
            "I ordered {items} by mistake, please cancel that.",
            "Is it possible to cancel {items}?",
            "pls cancel {items}.",
            "Do not ship {items}.",
            "I have to cancel my purchase of {items}.",
            "Stop the delivery of {items}.",
            "We don't want {items} any more, so cancel it.",
            "Kindly cancel {items} that I ordered yesterday.",
            "I found it cheaper elsewhere, so cancel {items}.",
            "Cancellation of {items}.",
            "Delete my order: {items}.",
            "My order for {items} should be cancelled.",
            "Forget my order of {items}.",
            "Please drop {items} from my basket, I won't buy it.",
            "I won't be needing {items} after all, cancel please.",
            "Withdraw my order for {items}.",
            "No longer wanted: {items}, please cancel.",
            "Please stop {items} before it goes out.",
            "Ignore my order for {items}, I take it back.",
            "I'm cancelling {items}.",
            "Abort my purchase of {items}.",
            "You can cancel {items}, my husband bought that already.",
            "Undo my order of {items}, please.",
        ),
        "status": (
            "Where is my order of {items}?",
            "When will {items} arrive?",
            "Has my parcel with {items} left yet?",
            "Any news about {items} I ordered?",
            "What is the status of my order for {items}?",
            "Have you shipped {items} yet?",
            "I'm still waiting for {items}.",
            "Could you track {items} for me?",
            "How long until I get {items}?",
            "I ordered {items} last week, where is my parcel?",
            "Can you tell me where my order of {items} is now?",
            "Did you send out {items}?",
            "Is my order of {items} on its way?",
            "I have not had a tracking number for {items}.",
            "Any update on {items}?",
            "When can I expect {items}?",
            "wheres my order with {items}?",
            "Please check the delivery date of {items}.",
            "My order of {items} shows no date. When does it come?",
            "I would like to know how my order of {items} is going.",
            "Status of {items}?",
            "Still no sign of {items}, is it shipped?",
            "My tracking page for {items} is empty, where is it?",
            "How is my delivery of {items} coming along?",
            "Is {items} still in your warehouse or already sent?",
            "When do you deliver {items}?",
            "Do you know when {items} will be here?",
            "I'd love to know the arrival date of {items}.",
            "Was my parcel with {items} handed to the post?",
            "What happened to my shipment of {items}? I have seen no update.",
            "Is the order with {items} out for delivery?",
            "Can I get a delivery date for {items}?",
        ),
        "complaint": (
            "I received {items}, broken.",
            "You sent me {items} in terrible condition.",
            "My parcel with {items} came damaged.",
            "I'm very unhappy with {items}.",
            "I want to complain about {items}.",
            "{items} arrived broken.",
            "I got {items} full of scratches.",
            "The quality of {items} is awful.",
            "I am disappointed: {items} fell apart after one day.",
            "{items}: all of it stopped working.",
            "There's a crack in what you sent me: {items}.",
            "Bad quality! {items} and nothing works.",
            "This is a complaint about {items}.",
            "I paid for {items} and got something broken.",
            "You delivered {items} with parts missing.",
            "{items} came dirty and dented.",
            "I'm really angry about {items}, such poor work.",
            "Faulty: {items}.",
            "Terrible service, {items} turned up smashed.",
            "Not happy at all: {items} came with holes.",
            "My new {items} broke at first use.",
            "The box was wet and {items} ruined.",
            "This does not work: {items}.",
            "I regret buying {items}, it broke at once.",
            "How could you ship {items} with such damage?",
            "{items} - what a waste of money, all broken.",
            "Half of it is defective: {items}.",
            "The paint is coming off {items}, that's a shame.",
            "I must complain, {items} came with cracks.",
            "You ought to check what you send: {items} came torn.",
            "We opened the box and found {items} in pieces.",
            "I expected better: {items}, such poor quality.",
        ),
    },
    whole={
        "order": (
            "Order for {name}, {city}: {items}.",
            "Please send {items} to {name} in {city}.",
            "{name} in {city} needs {items}.",
            "I'm {name} and want {items} shipped to {city}.",
            "{items} for {name}, {city}.",
            "Could {name} from {city} get {items}?",
            "Deliver {items} to {city}, please, for {name}.",
            "Buying {items}. {name}, {city}.",
        ),
        "return": (
            "Return from {name}, {city}: {items}.",
            "{name} in {city} wants to return {items}.",
            "Please collect {items} from {name} in {city} as a return.",
            "Refund {name} of {city} for {items}, sent back today.",
            "{items} coming back to you from {city}, {name}.",
            "I, {name}, return {items} from {city}.",
        ),
        "cancel": (
            "Cancel for {name}, {city}: {items}.",
            "{name} in {city} wants to cancel {items}.",
            "Don't deliver {items} to {name} in {city}.",
            "Please cancel {items}, ordered by {name} from {city}.",
            "{items} for {name} in {city}: cancel it.",
            "Stop sending {items} to {city}, I don't want it. {name}",
        ),
        "status": (
            "Status for {name}, {city}: {items}.",
            "When will {items} reach {name} in {city}?",
            "{name} from {city} asks where the order of {items} is.",
            "Did {items} for {name} leave for {city}?",
            "{name}, {city}, still waiting for {items}.",
            "Any news of {items} going to {city}? {name}",
        ),
        "complaint": (
            "Complaint from {name}, {city}: {items} broken.",
            "{name} in {city} is unhappy with {items}.",
            "{items} came damaged to {name} in {city}.",
            "{name} from {city} complains about {items}.",
            "You sent {items} to {city} and all is defective. {name}",
            "Bad news from {city}: {items} arrived in pieces. {name}",
        ),
    },
    urgency={
        "high": _lines(
            """
            It's urgent. | This is urgent, please. | I need this today. | Please hurry. | As soon as possible, please.
            | ASAP please. | I need it done by tomorrow morning. | Please treat this as a priority. | It has to happen
            before tonight. | URGENT! | Quickly, please, time is short. | The deadline is tomorrow. | This is an
            emergency. | Please deal with this immediately. | I'm in a great hurry. | Right away if you can. | Please
            answer within the hour. | The party is tonight! | I'm running out of time. | Fast, please! | Drop
            everything else, please. | Every hour counts. | It is really pressing. | Top priority for us. | We leave
            tomorrow, so be quick. | I can't wait any longer. | asap!! | Hurry up, please! | Express service, please.
            | Today is the last possible day. | Be quick about it. | It's needed very soon, in a few hours. | I need
            your help at once today. | Please speed this up. | This is critical for us. | We need it very fast. | Time
            is of the essence. | I need an answer immediately. | Please do not let me wait. | Our guests arrive in two
            hours.
            """
        ),
        "low": _lines(
            """
            No rush. | Take your time. | There's no hurry. | Whenever it suits you. | It isn't urgent at all. | Any
            time this month is fine. | I can wait a few weeks. | Next month is early enough. | Not pressing. | Low
            priority. | No need to hurry. | Whenever you get round to it. | It can wait. | I'm in no hurry. | At your
            leisure. | Slow handling is fine. | A late answer is fine. | No deadline on my side. | Don't stress about
            the timing. | We are not pressed for time. | Feel free to do mine last. | It doesn't matter when. | no
            hurry! | Not urgent. | Some day soon-ish will do. | Don't rush. | I have lots of time. | It's okay if it
            takes a while. | You needn't be quick. | Do it when things are quiet. | Other customers can go first. |
            Any week will do. | I am not pressed for time. | There's no deadline. | Please take all the time you need.
            | It's nothing urgent. | I don't mind waiting. | Later is fine too. | We have time until winter. | Nothing
            about this is urgent.
            """
        ),
        "normal": (),
    },
    fillers=_lines(
        """
        Thanks. | Many thanks. | Thank you very much. | Have a nice day. | I like your shop. | Please confirm. | You
        can email me. | I paid by card. | I am a regular customer. | My address is the same as last time. | The
        weather is lovely here. | Please send the invoice too. | My kids love your shop. | A friend told me about you.
        | Hope you are well. | thanks! | Let me know if you have questions. | Is there a form to fill in? | I tried to
        phone but the line was busy. | It's for my office. | My sister wants the same. | I wrote to you before. |
        Sorry for the bother. | Thank you for your help.
        """
    ),
)
