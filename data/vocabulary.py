"""Names, cities and products of the training rows, and others for the held-out rows.

The two sides share no word (tests/test_data.py checks this), so a held-out answer can only be correct if the model
copies it from the message. First names and cities are chosen so that the default model's tokenizer splits them the same
way after a quote as after a space (data/README.md explains why).
"""

from dataclasses import dataclass

Words = tuple[str, ...]


def _words(text: str) -> Words:
    return tuple(part.strip() for part in " ".join(text.split()).split(","))


# (nouns, modifiers) of a category. Modifiers are combined with nouns of the same category, to avoid "striped hammer".
Shelf = tuple[Words, Words]

FIRST_NAMES = _words("""
    Adam, Aisha, Alex, Alexander, Alice, Alvin, Amir, Anders, Andrew, Angus, Anika, Anita, Ann, Anna, Anne, Archie,
    Arjun, Arthur, Ash, Astrid, Audrey, Ben, Bob, Bonnie, Callum, Camille, Carl, Carla, Chidi, Chloe, Chris, Clive,
    Dan, Daniel, Danny, Daria, Darren, David, Desmond, Donald, Donna, Dora, Dylan, Edna, Edward, Eileen, Elizabeth,
    Elliot, Emil, Emily, Enid, Esme, Evelyn, Ewa, Fatima, Fiona, Frank, Fred, Freya, Frieda, Gareth, Gina, Gita,
    Greg, Gus, Gwen, Hamid, Hector, Henry, Hilda, Ida, Igor, Imogen, Ines, Ingrid, Ismail, Jack, Jacob, Jamal,
    James, Jamie, Jan, Jana, Jane, Janice, Jasper, Javier, Jeff, Jim, Joanna, Johan, John, Jonas, Joseph, Josh,
    Keiko, Ken, Kenji, Kofi, Kyle, Lance, Leila, Lena, Lily, Lois, Lola, Lorna, Louis, Luc, Luke, Lydia, Mabel,
    Magda, Malik, Marc, Maria, Marie, Marta, Mary, Matilda, Matt, Matthew, Maureen, Maya, Megan, Michael, Michel,
    Mina, Monika, Myra, Neil, Nick, Nicola, Noel, Olaf, Olga, Paul, Pavel, Penelope, Peter, Petra, Phil, Phoebe,
    Quentin, Ramona, Ray, Reggie, Renata, Richard, Rita, Rob, Robert, Roman, Rory, Roxanne, Rufus, Salma, Sam,
    Samuel, Sarah, Shane, Sheila, Silvia, Simon, Sonia, Stan, Stella, Stephen, Sven, Tamara, Tanya, Theo, Thomas,
    Tim, Tina, Tom, Tomas, Travis, Valerie, Vanessa, Victor, Wanda, Wilfred, William, Xavier, Yara, Yasmin, Yuki,
    Yvonne, Zara, Zoe""")

LAST_NAMES = _words("""
    Abbott, Achebe, Adams, Ahmed, Ali, Almeida, Alvarez, Andersen, Andrews, Armstrong, Bailey, Baker, Bakker,
    Balogun, Banerjee, Barlow, Barnes, Bauer, Becker, Bell, Bennett, Berg, Bianchi, Bjork, Blake, Blanc, Boateng,
    Bondarenko, Bouchard, Brandt, Brooks, Brown, Burke, Byrne, Campbell, Carlsson, Carter, Cartwright, Caruso,
    Castillo, Chan, Chandra, Chapman, Chowdhury, Clarke, Cohen, Collins, Conti, Cooper, Costa, Cruz, Dahl, Das,
    Davies, Dawson, Delgado, Dimitrov, Drummond, Dubois, Duncan, Edwards, Ellis, Eriksson, Esposito, Evans, Eze,
    Farrell, Faulkner, Ferrari, Fischer, Fleming, Flores, Fonseca, Foster, Fraser, Fuentes, Gallagher, Garcia,
    Georgiou, Gibson, Goldberg, Gomez, Gonzalez, Gordon, Graf, Gupta, Haas, Haddad, Hall, Halloran, Hansen, Harris,
    Hartley, Hayes, Hernandez, Hoffmann, Holm, Horvath, Howard, Huang, Hughes, Hunter, Hussain, Ito, Iversen,
    Jackson, Jankowski, Jensen, Johansson, Johnson, Jones, Joshi, Jovanovic, Kapoor, Kaya, Keller, Kelly, Kennedy,
    Khan, Kim, Kimura, King, Klein, Koch, Kovacs, Kowalski, Kruger, Kumar, Lambert, Larsen, Laurent, Lee, Lehmann,
    Leroy, Lewis, Li, Lindgren, Lindqvist, Lombardi, Lopez, Lynch, MacLeod, Marchetti, Marino, Marshall, Martinez,
    Mason, Mbeki, Mehta, Mendoza, Meyer, Mitchell, Molina, Moore, Morales, Moreau, Moretti, Morgan, Morris, Murphy,
    Murray, Nakagawa, Nakamura, Navarro, Nelson, Neumann, Nguyen, Nielsen, Novak, Nowak, Nyberg, O'Brien, Okafor,
    Oliveira, Olsen, Ortiz, Osman, Owens, Palmer, Papadopoulos, Park, Parker, Patel, Pereira, Perez, Petrov,
    Pettersen, Phillips, Popescu, Powell, Pritchard, Quigley, Quinn, Radcliffe, Rahman, Ramirez, Rao, Rasmussen,
    Reed, Reid, Reyes, Ricci, Richter, Rivera, Roberts, Robinson, Rodriguez, Rojas, Romano, Rossi, Roy, Ruiz,
    Russell, Salazar, Sanchez, Sandoval, Santos, Sato, Schmidt, Schneider, Schulz, Scott, Sharma, Shaw, Silva,
    Simmons, Singh, Smith, Sokolov, Stavros, Stewart, Suzuki, Sørensen, Tanaka, Taylor, Thompson, Torres, Tremblay,
    Turner, Underwood, Usman, Vandenberg, Vargas, Vasquez, Villanueva, Virtanen, Vogel, Wagner, Walker, Wang, Ward,
    Watson, Weber, Whitaker, Wilson, Winslow, Wolf, Wong, Wood, Wright, Yamada, Yamamoto, Yang, Yilmaz, Young,
    Zhang, Zielinski, Zimmer""")

CITIES = _words("""
    Aachen, Abilene, Accra, Akron, Albuquerque, Algiers, Alicante, Almaty, Amman, Ann Arbor, Antwerp, Armagh,
    Asheville, Aspen, Ayr, Bari, Battle Creek, Beirut, Belgrade, Bern, Bordeaux, Boston, Braga, Bremen, Brest, Brno,
    Bruges, Burlington, Burnaby, Bursa, Cambridge, Caracas, Carlisle, Casablanca, Chicago, Christchurch, Clifton,
    Cody, Colchester, Colombo, Corvallis, Coventry, Crewe, Cusco, Da Nang, Dakar, Dar es Salaam, Darlington, Darwin,
    Davos, Decatur, Delft, Des Moines, Doha, Doncaster, Dordrecht, Dortmund, Durban, Eau Claire, Eindhoven, El Paso,
    Elgin, Erfurt, Evora, Fairfax, Fargo, Fort Worth, Freiburg, Fremont, Funchal, Galway, Gdansk, Genoa, Ghent,
    Gijon, Girona, Gisborne, Gothenburg, Grand Rapids, Graz, Greenville, Great Falls, Groningen, Haarlem, Haifa,
    Hanoi, Hanover, Harare, Harrogate, Hereford, Innsbruck, Inverness, Ipswich, Isfahan, Jena, Joliet, Kandy,
    Kassel, Key West, Kiel, Kigali, Kobe, Koblenz, Kuala Lumpur, La Paz, Lansing, Laredo, Larnaca, Lausanne, Lille,
    Limerick, Lincoln, Linz, Little Rock, Ljubljana, London, Long Beach, Los Angeles, Lucerne, Luton, Malaga,
    Marseille, Medford, Medicine Hat, Melrose, Messina, Metz, Mexico City, Middlesbrough, Modena, Mombasa, Monaco,
    Montpellier, Moose Jaw, Mount Vernon, Murcia, Muscat, Nantes, Naperville, Nassau, Newark, New York, Newton,
    Nicosia, Northampton, Norwich, Novi Sad, Odessa, Osaka, Ostrava, Oulu, Oxford, Paderborn, Padua, Palermo,
    Paphos, Paris, Parma, Pecs, Penrith, Peoria, Perugia, Pisa, Plovdiv, Porto, Prince George, Rabat, Red Deer,
    Redding, Reims, Rennes, Roanoke, Rockford, Rome, Rosario, Rostock, Rotterdam, Royal Oak, Salamanca, Salzburg,
    San Diego, Scranton, Siena, Silver Spring, Skopje, Sligo, Solihull, South Bend, Spokane, Stockton, Strasbourg,
    Stuttgart, Sugar Land, Tampere, Taunton, Tel Aviv, Topeka, Torquay, Trier, Trieste, Tripoli, Turin, Uppsala,
    Utrecht, Valencia, Varna, Verona, Vigo, Waco, Washington, Waterford, White Plains, Wichita, Wigan, Winter Haven,
    Woking, Wuppertal, Yonkers, Zadar, Zagreb, Zaragoza""")

# Modifiers that go with every noun.
STYLES = _words("""
    acrylic, alpine, amber, aqua, automatic, baroque, basic, beige, big, braided, branded, bright, burgundy, cane,
    cardboard, celestial, cheap, cherry, childproof, chrome, clay, cobalt, concrete, contemporary, coral, plush,
    crystal, cubic, curved, cute, Danish, decorative, deep, delicate, denim, detachable, disposable, dotted,
    durable, emerald, exotic, extendable, fancy, fireproof, flat, floral, fragile, French, funny, golden, gothic,
    granite, handy, hexagonal, hollow, huge, imperial, indigo, Italian, jade, Japanese, khaki, lavender, lime,
    little, lockable, lunar, luxurious, maple, matte, mechanical, medium, metallic, mint, mustard, narrow, natural,
    nautical, neon, nickel, olive, ordinary, organic, ornate, oversized, padded, pale, pastel, peach, pearl,
    personalised, pine, playful, plum, pointed, polished, popular, practical, premium, quaint, rainbow, rare,
    removable, replacement, reusable, ribbed, robust, rounded, royal, rubber, ruby, ruffled, salmon, satin, scarlet,
    Scottish, serious, silk, simple, slate, sliding, soundproof, spare, special, spherical, spotted, stackable,
    stone, stylish, Swedish, swivel, tan, teal, thin, tiny, traditional, transparent, triangular, tropical, upright,
    velour, violet, walnut, washable, wicker, wide, windproof""")

TRAIN_SHELVES: tuple[Shelf, ...] = (
    (
        _words("""
            mug, bowl, plate, jug, tray, cup, butter dish, pitcher, coaster, salt shaker, egg cup, cake
            stand, mixing bowl, sugar bowl, serving dish, soup plate, platter, gravy boat, beaker, dinner plate,
            cookie jar, fruit bowl, punch bowl"""),
        _words("ceramic, enamel, blue, large, porcelain, stoneware, small, handmade"),
    ),
    (
        _words("""
            kettle, ladle, whisk, colander, rolling pin, grater, wok, peeler, cutting board, breadboard, bread box,
            frying pan, cake tin, carafe, garlic press, espresso maker, funnel, skewer, cleaver, bottle opener, can
            opener, potato masher, pastry             brush, measuring cup, baking sheet, pressure cooker, steamer,
            apple corer, ice             bucket, cocktail shaker"""),
        _words("copper, steel, wooden, shiny"),
    ),
    (
        _words("""
            towel, blanket, apron, curtain, tablecloth, pillow, bath mat, tea towel, rug, bedsheet, duvet, oven
            glove, pot holder, bathrobe, table runner, seat cover, face cloth, bolster, shawl, dishcloth, ribbon,
            placemat, washcloth, sleeping             mask, floor cushion, canopy"""),
        _words("linen, cotton, striped, checked, grey, soft, green, patterned, thick"),
    ),
    (
        _words("""
            rake, planter, watering can, spade, hose, flower pot, bird feeder, garden chair, lantern, seed tray,
            bucket, garden gnome, hedge trimmer, window box, fence             panel, birdbath, hoe, weeder,
            fountain, rain gauge, patio             heater, swing, picnic table, deck chair, nesting box, log
            basket, fire pit"""),
        _words("plastic, sturdy, weatherproof, black, dark green"),
    ),
    (
        _words("""
            notebook, pencil, folder, stapler, ruler, eraser, calendar, diary, binder, fountain pen, marker,
            postcard, sticker, desk lamp, whiteboard, paper clip, ink cartridge, wall map, gift card, pencil case,
            pen, letter opener, hole punch, paperweight, atlas, journal, planner, ledger, rubber stamp, easel,
            canvas, label maker, birthday card, poster, address book"""),
        _words("leather, slim, recycled, yellow, pocket, classic, ivory"),
    ),
    (
        _words("""
            hammer, drill, wrench, saw, ladder, toolbox, tape measure, clamp, spirit level, torch, extension cord,
            padlock, wire brush, work light, paint roller, hand saw, pocket             knife, sander, spanner, axe,
            anvil, jack, winch, bolt, rasp, tile             cutter, workbench, dust mask, crate, vice"""),
        _words("heavy, adjustable, electric, compact, magnetic, professional"),
    ),
    (
        _words("""
            puzzle, teddy bear, kite, board game, doll, spinning top, train set, toy car, building block, balloon,
            model plane, card game, drum, music box, toy boat, pinwheel, water pistol, rubber duck, paddling
            pool, playhouse, magic wand, telescope, hula hoop, model ship"""),
        _words("colourful, painted, giant, vintage, educational"),
    ),
    (
        _words("""
            lamp, candle, vase, picture frame, mirror, clock, bookshelf, stool, basket, coat rack, alarm clock,
            light bulb, door handle, side table, wall hook, storage box, photo album, armchair, soap dish, ottoman,
            nightstand, footrest, chest, cupboard, doorstop, bookend, headboard, umbrella stand, key rack, bar
            stool, magazine rack, night             light, barometer, piggy bank, hanger, dustpan, broom, mop,
            feather duster, ironing board, towel rail, chair"""),
        _words("round, white, antique, modern, tall, cream, square"),
    ),
    (
        _words("""
            tent, backpack, sleeping bag, compass, water bottle, helmet, raincoat, camping stove, bike
            pump, bike lock, walking pole, yoga mat, thermos, tennis ball, skipping rope, picnic blanket, cool box,
            football, tennis racket, canoe, paddle, oar, snowboard, sled, hip flask, mess tin, golf club, punching
            bag, barbell, exercise bike, saddle, headband, knee pad, baseball cap"""),
        _words("waterproof, lightweight, orange, insulated, foldable"),
    ),
    (
        _words("""
            charger, cable, adapter, keyboard, headset, speaker, webcam, battery, phone case, power bank, mouse pad,
            memory card, radio, monitor, remote control, desk fan, toothbrush, toaster, blender, tripod, smart plug,
            earphone, tablet, phone, modem, scanner, amplifier, drone, smartwatch, stopwatch, hair dryer, shaver,
            vacuum cleaner, heater, rice             cooker, egg timer, kitchen scale, sewing machine, light switch,
            joystick, games console, smoke alarm"""),
        _words("wireless, portable, silver, mini"),
    ),
    (
        _words("""
            hat, sweater, sock, belt, shirt, jacket, umbrella, beanie, summer dress, winter coat, glove, wallet,
            handbag, shoe rack, mitten, blouse, cape, coat, vest, hoodie, jumper, kilt, sandal, boot, trainer,
            loafer, brooch, earring, purse, briefcase, bandana, bonnet, gown, tunic, sunhat, visor, veil, wig,
            blazer, parka, hairband"""),
        _words("knitted, red, warm, plain, navy, brown"),
    ),
)

HELD_OUT_SHELVES: tuple[Shelf, ...] = (
    (
        _words("""
            spoon, fork, skillet, pepper mill, sieve"""),
        _words("bamboo, marble, turquoise"),
    ),
    (
        _words("""
            quilt, bedspread"""),
        _words("velvet, purple"),
    ),
    (
        _words("""
            bench, greenhouse, lawn mower, compost bin, sun lounger"""),
        _words("folding, solid"),
    ),
    (
        _words("""
            clipboard, globe, bookmark, typewriter, glue stick"""),
        _words("pink"),
    ),
    (
        _words("""
            crowbar, nail gun, mallet, hinge, soldering iron"""),
        _words("rugged"),
    ),
    (
        _words("""
            rocking horse, robot, rattle"""),
        _words("fluffy, retro"),
    ),
    (
        _words("""
            wardrobe, doorbell, sofa"""),
        _words("oval, rustic, brass"),
    ),
    (
        _words("""
            whistle, fishing rod, bicycle"""),
        _words("reflective"),
    ),
    (
        _words("""
            router, microphone, projector, hard drive, calculator, printer, camera"""),
        _words("bluetooth, digital"),
    ),
    (
        _words("""
            cardigan, necktie, skirt"""),
        _words("tweed, maroon"),
    ),
)


@dataclass(frozen=True)
class Vocabulary:
    """One side (training or held-out) of what fills a message."""

    first_names: Words
    last_names: Words
    cities: Words
    styles: Words
    shelves: tuple[Shelf, ...]

    def nouns(self) -> list[tuple[str, Words]]:
        """Return every product without a modifier, with the modifiers that suit its shelf."""
        return [(noun, modifiers) for nouns, modifiers in self.shelves for noun in nouns]

    def products(self) -> set[str]:
        """Return every product in the singular: each noun alone, and with each modifier that goes with it."""
        return {f"{modifier} {noun}".strip() for noun, own in self.nouns() for modifier in ("", *own, *self.styles)}


def _kept(words: Words) -> Words:
    return tuple(word for i, word in enumerate(words) if i % 5)


def _held_out(words: Words) -> Words:
    """Return every fifth word: by position, so that the held-out ones are no easier than the others."""
    return words[::5]


TRAIN = Vocabulary(
    first_names=_kept(FIRST_NAMES),
    last_names=_kept(LAST_NAMES),
    cities=_kept(CITIES),
    styles=_kept(STYLES),
    shelves=TRAIN_SHELVES,
)
HELD_OUT = Vocabulary(
    first_names=_held_out(FIRST_NAMES),
    last_names=_held_out(LAST_NAMES),
    cities=_held_out(CITIES),
    styles=_held_out(STYLES),
    shelves=HELD_OUT_SHELVES,
)
