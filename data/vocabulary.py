"""Names, cities and products: the words that training rows show, and those that only held-out rows show.

The two sides share no word (tests/test_data.py holds that), so a held-out answer can only be right when the model
copies it out of the message.
"""

from dataclasses import dataclass

Words = tuple[str, ...]


def _words(text: str) -> Words:
    return tuple(part.strip() for part in " ".join(text.split()).split(","))


# A category's modifiers go with its nouns only, so that no "striped hammer" is on offer: (nouns, modifiers).
Shelf = tuple[Words, Words]

FIRST_NAMES = _words("""
    Aaron, Abigail, Adam, Agnes, Aisha, Alan, Albert, Alejandro, Alice, Alistair, Amanda, Amara, Amir, Amy, Anders,
    Andrea, Andrew, Angela, Anika, Anna, Anthony, Antonio, Arjun, Arthur, Astrid, Ayesha, Barbara, Beatrice,
    Beatriz, Ben, Bianca, Bogdan, Boris, Brenda, Brian, Bridget, Bruno, Callum, Camille, Carla, Carlos, Carmen,
    Caroline, Catherine, Cecilia, Cedric, Chen, Chidi, Chloe, Christian, Clara, Claudia, Colin, Connor, Cristina,
    Dagmar, Daniel, Daria, David, Deborah, Delia, Desmond, Diana, Diego, Dmitri, Dominic, Dora, Edith, Eduardo,
    Edward, Eleanor, Elena, Elias, Eliza, Elsa, Emeka, Emily, Emma, Enrique, Eric, Esther, Eva, Ewa, Fabio, Farah,
    Fatima, Felix, Fergus, Fernando, Fiona, Flora, Frank, Freya, Gabriel, Gareth, George, Gerald, Gita, Giulia,
    Gloria, Grace, Graham, Greta, Gustav, Hamid, Hannah, Hans, Harold, Harriet, Hassan, Heather, Hector, Helen,
    Henry, Hilda, Hiroshi, Hugo, Ian, Ibrahim, Imogen, Ines, Ingrid, Irene, Isabel, Ismail, Ivan, Jack, Jacob,
    James, Jana, Jasper, Javier, Jean, Jessica, Joanna, Joel, Johan, John, Jolanta, Jonas, Joseph, José, Joyce,
    Julia, Julian, Kamal, Karen, Karim, Kate, Keiko, Kenji, Kenneth, Kevin, Khadija, Kirsten, Klara, Kofi, Lars,
    Laura, Leila, Lena, Leo, Liam, Lorenzo, Lucas, Lucy, Luis, Lukas, Lydia, Magda, Malik, Manuel, Marco, Marek,
    Margaret, Maria, Marta, Martin, Mary, Matilda, Matteo, Maureen, Max, Megan, Mei, Michael, Miguel, Mina, Mirela,
    Mohammed, Monika, Nadia, Naomi, Natalie, Nathan, Niamh, Nicola, Nigel, Nina, Noah, Nora, Oksana, Olga, Oliver,
    Omar, Oscar, Otto, Pablo, Patricia, Paul, Pavel, Pedro, Penelope, Peter, Petra, Philip, Priya, Quentin, Rachel,
    Rafael, Rahul, Raj, Ramona, Rebecca, Renata, Richard, Rita, Robert, Rosa, Rosalind, Ruth, Salma, Samuel, Sandra,
    Sanjay, Sarah, Sean, Sibyl, Simon, Sofia, Stefan, Stella, Susan, Sven, Takeshi, Tanya, Tariq, Teresa, Thomas,
    Tim, Tobias, Tomas, Ulrika, Ursula, Valentina, Vera, Vernon, Victor, Vikram, Walter, Wanda, Wei, William,
    Winston, Xavier, Yara, Yolanda, Yuki, Yusuf, Zara, Zoltan, Zoë""")

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
    Aarhus, Aberdeen, Abu Dhabi, Accra, Addis Ababa, Adelaide, Albany, Albuquerque, Aleppo, Algiers, Almaty, Amman,
    Amsterdam, Ankara, Antwerp, Athens, Atlanta, Auckland, Austin, Baghdad, Baku, Baltimore, Bamako, Bangkok,
    Barcelona, Bari, Basel, Baton Rouge, Beirut, Belfast, Belgrade, Bergen, Berlin, Bern, Biarritz, Bilbao,
    Birmingham, Bogotá, Bologna, Bordeaux, Boston, Bradford, Bratislava, Bremen, Brest, Brighton, Brisbane, Bristol,
    Brno, Brussels, Bucharest, Budapest, Buenos     Aires, Buffalo, Bursa, Cairo, Calgary, Cambridge, Canberra, Cape
    Town, Cardiff, Casablanca, Cedar Rapids, Charlotte, Chattanooga, Chennai, Chicago, Cincinnati, Cleveland,
    Cologne, Columbus, Copenhagen, Cork, Coventry, Cádiz, Córdoba, Dakar, Dallas, Damascus, Darwin, Delft, Delhi,
    Denver, Derby, Detroit, Dhaka, Dijon, Doha, Dortmund, Dresden, Dubai, Dublin, Dundee, Dunkirk, Durban,
    Düsseldorf, Edinburgh, Eindhoven, El Paso, Exeter, Fargo, Freetown, Fresno, Galway, Gdansk, Geneva, Genoa,
    Ghent, Glasgow, Gothenburg, Granada, Graz, Grenoble, Groningen, Halifax, Hamburg, Hanoi, Hanover, Harare,
    Havana, Helsinki, Hiroshima, Hobart, Hong Kong, Houston, Hull, Innsbruck, Inverness, Istanbul, Izmir, Jaipur,
    Jakarta, Kampala, Karachi, Kathmandu, Kigali, Krakow, Kuala Lumpur, Kyoto, La Paz, Lagos, Lahore, Lancaster, Las
    Vegas, Lausanne, Leeds, Leicester, Leipzig, Leuven, Lille, Lima, Limerick, Linz, Lisbon, Liverpool, London, Long
    Beach, Los Angeles, Louisville, Lublin, Lugano, Lusaka, Luxembourg, Lyon, Maastricht, Madison, Madrid, Malaga,
    Malmö, Manchester, Manila, Marseille, Melbourne, Memphis, Miami, Milan, Minsk, Mombasa, Montevideo, Montpellier,
    Montreal, Moscow, Mumbai, Munich, Nagoya, Nairobi, Nantes, Naples, Nashville, New York,
    Newcastle, Nicosia, Norwich, Nottingham, Oakland, Odense, Omaha, Osaka, Oslo, Ottawa, Oxford, Padua, Palermo,
    Palm Springs, Paris, Parma, Perth, Philadelphia, Phoenix, Pisa, Pittsburgh, Plymouth, Portland, Porto,
    Portsmouth, Poznan, Prague, Pretoria, Quito, Rennes, Reykjavik, Riga, Rio de Janeiro, Riyadh, Rome, Rosario,
    Rotterdam, Rouen, Sacramento, Salem, Salzburg, San Diego, Sarajevo, Seattle, Seoul, Seville, Shanghai,
    Sheffield, Sibiu, Siena, Singapore, Skopje, Sofia, Southampton, St Albans, Stockholm, Strasbourg, Stuttgart,
    Swansea, Sydney, São Paulo, Tacoma, Taipei, Tallinn, Tampa, Tampere, Tbilisi, Tehran, Thessaloniki, Tirana,
    Tokyo, Toledo, Topeka, Toronto, Toulouse, Trento, Trieste, Tromsø, Tunis, Turin, Uppsala, Utrecht, Valencia,
    Vancouver, Venice, Verona, Vienna, Vigo, Vilnius, Warsaw, Washington, Wellington, Wichita, Winnipeg, Wroclaw,
    Yerevan, Zagreb, Zaragoza, Zurich""")

# Modifiers that go with every noun.
STYLES = _words("""
    acrylic, alpine, amber, aqua, automatic, baroque, basic, battery-powered, beige, big, birch, braided, branded,
    breathable, bright, bronze, burgundy, cane, canvas-covered, cardboard,  celestial, charcoal, cheap,
    cherry, childproof, chrome, clay, cobalt, collapsible, concrete, contemporary, coral, corduroy, cork, crimson,
    crocheted, crystal, cubic, curved, cute, Danish, decorative, deep, delicate, deluxe, denim, detachable,
    dishwasher-safe, disposable, dotted, durable, embossed, emerald, engraved, exotic, extendable, fancy, festive,
    fireproof, flat, floral, fragile, freestanding, French, fringed, frosted, funny, gas-powered, glossy, golden,
    gothic, granite, handy, hexagonal, hollow, huge, hypoallergenic, imperial, indigo, Italian, jade, Japanese,
    khaki, lavender, left-handed, lilac, lime, little, lockable,  lunar, luxurious, magenta, mahogany, maple,
    matte, mauve, mechanical, medium, metallic, microwaveable, minimalist, mint, multicoloured, mustard, narrow,
    natural, nautical, neon, nickel, non-slip, old-fashioned, olive, ordinary, organic, ornate, oversized, padded,
    pale,  pastel, peach, pearl, personalised, pewter, pine, playful, plum, pointed, polished, popular,
    practical, premium, quaint,  rainbow, rare, rattan, refillable, refurbished, removable, replacement,
    reusable, ribbed, robust, rounded, royal, rubber, ruby, ruffled, salmon, sapphire, satin, scarlet, scented,
    Scottish, second-hand, serious,  silk, simple, slate, sleek, sliding, solar-powered, soundproof, spare,
    sparkling, special, spherical, spotted, stackable, stone, stretchy, stylish, suede, Swedish, swivel, tan,
    tapered, tartan, teal, thick-walled, thin, tinted, tiny, traditional, transparent, trendy, triangular, tropical,
    two-tone, unbreakable, upright, varnished, velour, violet, wall-mounted, walnut, washable, whimsical, wicker,
    wide, windproof""")

TRAIN_SHELVES: tuple[Shelf, ...] = (
    (
        _words("""
            mug, bowl, plate, teapot, jug, tray, cup, butter dish, pitcher, coaster, salt shaker, egg cup, cake
            stand, mixing bowl, coffee pot, biscuit tin, sugar bowl, serving dish, soup plate, saucer, goblet,
            platter, gravy boat, tumbler, beaker, decanter, tureen, teacup, dinner plate, champagne flute,
            candlestick, cookie jar, fruit bowl, punch bowl"""),
        _words("ceramic, enamel, blue, large, porcelain, stoneware, small, handmade"),
    ),
    (
        _words("""
            kettle, saucepan, ladle, whisk, colander, rolling pin, grater, spatula, wok, peeler, cutting board,
            breadboard, corkscrew, bread box, frying pan, cake tin, teaspoon, carafe, ramekin, garlic press,
            espresso maker, strainer, funnel, skewer, cleaver, bottle opener, can opener, potato masher, pastry
            brush, measuring cup, baking sheet, muffin tin, pressure cooker, steamer, apple corer, nutcracker, ice
            bucket, cocktail shaker"""),
        _words("copper, steel, wooden, shiny, lidded"),
    ),
    (
        _words("""
            towel, cushion, blanket, apron, curtain, tablecloth, napkin, pillow, bath mat, tea towel, rug, bedsheet,
            duvet, doormat, oven glove, pot holder, bathrobe, mattress, table runner, seat cover, face cloth,
            tapestry, bolster, comforter, shawl, dishcloth, ribbon, placemat, washcloth, mosquito net, sleeping
            mask, floor cushion, canopy"""),
        _words("linen, cotton, woollen, striped, checked, grey, soft, green, patterned, thick"),
    ),
    (
        _words("""
            rake, trowel, planter, watering can, spade, hose, flower pot, bird feeder, wheelbarrow, garden chair,
            parasol, hammock, lantern, seed tray, bucket, sprinkler, garden gnome, hedge trimmer, window box, fence
            panel, trellis, birdbath, pitchfork, hoe, weeder, gazebo, fountain, sundial, pergola, rain gauge, patio
            heater, barbecue, swing, picnic table, deck chair, nesting box, beehive, log basket, fire pit"""),
        _words("galvanised, terracotta, plastic, sturdy, weatherproof, black, dark green"),
    ),
    (
        _words("""
            notebook, pencil, envelope, folder, stapler, ruler, eraser, sketchbook, calendar, diary, binder,
            fountain pen, marker, postcard, sticker, desk lamp, whiteboard, paper clip, ink cartridge, wall map,
            gift card, pencil case, highlighter, pen, notepad, letter opener, hole punch, paperweight, atlas,
            journal, planner, ledger, rubber stamp, easel, canvas, chalkboard, bulletin board, label maker,
            protractor, birthday card, poster, scrapbook, address book"""),
        _words("leather, slim, recycled, yellow, pocket, classic, ivory"),
    ),
    (
        _words("""
            hammer, drill, screwdriver, wrench, saw, ladder, toolbox, tape measure, paintbrush, clamp, chisel,
            spirit level, torch, extension cord, padlock, wire brush, work light, paint roller, hand saw, pocket
            knife, hacksaw, sander, spanner, axe, anvil, jack, winch, pulley, bolt, bracket, rasp, scraper, tile
            cutter, workbench, dust mask, mousetrap, crate, trestle, vice"""),
        _words("cordless, heavy, adjustable, electric, compact, magnetic, professional"),
    ),
    (
        _words("""
            puzzle, teddy bear, kite, board game, doll, spinning top, train set, toy car, puppet, building block,
            balloon, model plane, card game, drum, music box, toy boat, frisbee, xylophone, marionette, tricycle,
            dollhouse, pinwheel, harmonica, tambourine, chessboard, dartboard, water pistol, rubber duck, paddling
            pool, playhouse, magic wand, telescope, hula hoop, model ship, kaleidoscope"""),
        _words("colourful, painted, giant, vintage, educational"),
    ),
    (
        _words("""
            lamp, candle, vase, picture frame, mirror, clock, bookshelf, stool, basket, coat rack, laundry bag,
            alarm clock, light bulb, door handle, side table, wall hook, storage box, photo album, armchair,
            lampshade, soap dish, ottoman, nightstand, footrest, shoehorn, chest, dresser, cupboard, cabinet,
            doorstop, bookend, headboard, umbrella stand, key rack, bar stool, magazine rack, jewellery box, night
            light, barometer, piggy bank, hanger, dustpan, broom, mop, feather duster, ironing board, towel rail,
            chair"""),
        _words("round, white, antique, modern, tall, cream, square"),
    ),
    (
        _words("""
            tent, backpack, sleeping bag, compass, water bottle, helmet, raincoat, camping stove, headlamp, bike
            pump, bike lock, walking pole, yoga mat, thermos, lunchbox, tennis ball, skipping rope, picnic blanket,
            cool box, football, tennis racket, snorkel, canteen, dumbbell, rucksack, canoe, paddle, oar, surfboard,
            snowboard, sled, carabiner, hip flask, mess tin, golf club, cricket bat, punching bag, barbell,
            kettlebell, treadmill, exercise bike, wetsuit, saddle, headband, knee pad, basketball, baseball cap,
            lifejacket"""),
        _words("waterproof, lightweight, orange, insulated, foldable"),
    ),
    (
        _words("""
            charger, cable, adapter, keyboard, headset, speaker, webcam, battery, phone case, power bank, mouse pad,
            memory card, radio, monitor, laptop sleeve, remote control, desk fan, toothbrush, toaster, blender,
            tripod, smart plug, earphone, laptop, tablet, phone, modem, scanner, amplifier, turntable, drone,
            smartwatch, stopwatch, hair dryer, shaver, vacuum cleaner, humidifier, heater, coffee grinder, rice
            cooker, waffle maker, egg timer, kitchen scale, sewing machine, light switch, joystick, games console,
            smoke alarm"""),
        _words("wireless, portable, silver, rechargeable, mini"),
    ),
    (
        _words("""
            hat, sweater, sock, belt, shirt, jacket, umbrella, beanie, slipper, summer dress, winter coat, glove,
            wallet, handbag, shoe rack, T-shirt, poncho, mitten, blouse, cape, coat, vest, hoodie, jumper, kilt,
            sandal, boot, trainer, loafer, brooch, bracelet, necklace, earring, purse, suitcase, briefcase, bandana,
            bonnet, gown, tunic, nightgown, shoelace, cufflink, sunhat, visor, veil, wig, blazer, parka, anorak,
            turtleneck, hairband"""),
        _words("knitted, red, warm, plain, navy, brown"),
    ),
)

HELD_OUT_SHELVES: tuple[Shelf, ...] = (
    (
        _words("""
            spoon, fork, skillet, casserole, pepper mill, sieve"""),
        _words("bamboo, marble, turquoise"),
    ),
    (
        _words("""
            quilt, bedspread, pillowcase, handkerchief"""),
        _words("velvet, purple, embroidered"),
    ),
    (
        _words("""
            shovel, bench, greenhouse, lawn mower, compost bin, sun lounger"""),
        _words("folding, solid"),
    ),
    (
        _words("""
            crayon, clipboard, globe, bookmark, typewriter, glue stick"""),
        _words("pink, elegant"),
    ),
    (
        _words("""
            crowbar, nail gun, mallet, hinge, soldering iron"""),
        _words("titanium, rugged"),
    ),
    (
        _words("""
            rocking horse, robot, trampoline, rattle"""),
        _words("fluffy, retro"),
    ),
    (
        _words("""
            wardrobe, chandelier, doorbell, sofa, carpet"""),
        _words("oval, rustic, brass"),
    ),
    (
        _words("""
            kayak, whistle, fishing rod, bicycle, scooter"""),
        _words("inflatable, reflective"),
    ),
    (
        _words("""
            router, microphone, projector, hard drive, calculator, printer, camera"""),
        _words("bluetooth, digital"),
    ),
    (
        _words("""
            cardigan, necktie, swimsuit, waistcoat, skirt"""),
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
    """Return every fifth word: by position, so that nobody picks easy ones."""
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
