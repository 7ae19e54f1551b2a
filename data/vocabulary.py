"""Names, cities and products: the words that training rows show, and those that only held-out rows show.

The two sides share no word (tests/test_data.py holds that), so a held-out answer can only be right when the model
copies it out of the message.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.replace("\n", " ").split(",") if part.strip())


# A category's modifiers go with its nouns only, so that no "striped hammer" is on offer: (nouns, modifiers).
Shelf = tuple[tuple[str, ...], tuple[str, ...]]

TRAIN_FIRST_NAMES = _words("""
    Aaron, Abigail, Adam, Aisha, Alan, Albert, Alejandro, Alice, Amanda, Amir, Amy, Andrea, Andrew, Angela,
    Anika, Anna, Anthony, Antonio, Arjun, Arthur, Astrid, Ayesha, Barbara, Beatriz, Ben, Bianca, Bogdan, Brian,
    Bridget, Bruno, Camille, Carla, Carlos, Caroline, Catherine, Cecilia, Chen, Chloe, Christian, Clara,
    Claudia, Colin, Connor, Cristina, Daniel, Daria, David, Deborah, Diana, Diego, Dmitri, Dominic, Dora, Edith,
    Eduardo, Edward, Elena, Eleanor, Eliza, Emily, Emma, Enrique, Eric, Esther, Eva, Fabio, Farah, Fatima,
    Felix, Fernando, Fiona, Frank, Freya, Gabriel, George, Gerald, Gita, Giulia, Grace, Graham, Greta, Gustav,
    Hannah, Hans, Harold, Harriet, Hassan, Heather, Hector, Helen, Henry, Hiroshi, Hugo, Ian, Ibrahim, Ines,
    Ingrid, Irene, Isabel, Ivan, Jack, Jacob, James, Jana, Javier, Jean, Jessica, Joanna, Joel, Johan, John,
    Jonas, José, Joseph, Joyce, Julia, Julian, Kamal, Karen, Karim, Kate, Keiko, Kenneth, Kevin, Khadija, Klara,
    Kofi, Lars, Laura, Lena, Leo, Leila, Liam, Lucas, Lucy, Luis, Lukas, Magda, Manuel, Marco, Margaret, Maria,
    Marek, Marta, Martin, Mary, Matilda, Matteo, Max, Megan, Mei, Michael, Miguel, Mina, Mohammed, Monika,
    Nadia, Naomi, Natalie, Nathan, Nicola, Nina, Noah, Nora, Oksana, Oliver, Omar, Oscar, Pablo, Patricia, Paul,
    Pedro, Peter, Petra, Philip, Priya, Rachel, Rafael, Rahul, Raj, Rebecca, Renata, Richard, Rita, Robert,
    Rosa, Ruth, Ryan, Salma, Samuel, Sandra, Sarah, Sean, Simon, Sofia, Stefan, Stella, Susan, Sven, Takeshi,
    Tanya, Teresa, Thomas, Tim, Tomas, Ursula, Valentina, Vera, Victor, Vikram, Walter, Wei, William, Xavier,
    Yara, Yuki, Yusuf, Zara, Zoë""")

HELD_OUT_FIRST_NAMES = _words("""
    Agnes, Alistair, Amara, Anders, Beatrice, Boris, Brenda, Callum, Carmen, Cedric, Chidi, Dagmar, Delia,
    Desmond, Elias, Elsa, Emeka, Ewa, Fergus, Flora, Gareth, Gloria, Hamid, Hilda, Imogen, Ismail, Jasper,
    Jolanta, Kenji, Kirsten, Lorenzo, Lydia, Malik, Maureen, Mirela, Niamh, Nigel, Olga, Otto, Pavel, Penelope,
    Quentin, Ramona, Roland, Rosalind, Sanjay, Sibyl, Tariq, Tobias, Ulrika, Vernon, Wanda, Winston, Yolanda,
    Zoltan""")

TRAIN_LAST_NAMES = _words("""
    Abbott, Adams, Ahmed, Ali, Almeida, Alvarez, Andersen, Andrews, Bailey, Baker, Banerjee, Barnes, Bauer,
    Becker, Bell, Bennett, Berg, Bianchi, Blake, Blanc, Boateng, Bondarenko, Brandt, Brooks, Brown, Burke,
    Byrne, Campbell, Carlsson, Carter, Castillo, Chan, Chandra, Chapman, Clarke, Cohen, Collins, Conti, Cooper,
    Costa, Cox, Cruz, Dahl, Das, Davies, Delgado, Dubois, Duncan, Edwards, Ellis, Eriksson, Esposito, Evans,
    Farrell, Ferrari, Fischer, Fleming, Flores, Foster, Fraser, Fuentes, Garcia, Gibson, Gomez, Gonzalez,
    Gordon, Graf, Green, Gupta, Haas, Hall, Hansen, Harris, Hayes, Hernandez, Hoffmann, Holm, Horvath, Howard,
    Huang, Hughes, Hunter, Hussain, Ito, Jackson, Jensen, Johansson, Johnson, Jones, Joshi, Kapoor, Kaya,
    Keller, Kelly, Kennedy, Khan, Kim, King, Klein, Koch, Kovacs, Kowalski, Kumar, Larsen, Laurent, Lee,
    Lehmann, Leroy, Lewis, Li, Lindgren, Lopez, Lynch, Marino, Marshall, Martinez, Mason, Mehta, Mendoza, Meyer,
    Mitchell, Molina, Moore, Morales, Moreau, Morgan, Moretti, Morris, Murphy, Murray, Nakamura, Navarro,
    Nelson, Neumann, Nguyen, Nielsen, Novak, Nowak, Oliveira, Olsen, Ortiz, Osman, Owens, Palmer, Papadopoulos,
    Park, Parker, Patel, Pereira, Perez, Petrov, Phillips, Popescu, Powell, Quinn, Rahman, Ramirez, Rao, Reed,
    Reid, Reyes, Ricci, Richter, Rivera, Roberts, Robinson, Rodriguez, Rojas, Romano, Rossi, Roy, Ruiz, Russell,
    Ryan, Salazar, Sanchez, Santos, Sato, Schmidt, Schneider, Schulz, Scott, Sharma, Shaw, Silva, Simmons,
    Singh, Smith, Sørensen, Stewart, Suzuki, Tanaka, Taylor, Thompson, Torres, Turner, Usman, Vargas, Vasquez,
    Virtanen, Vogel, Wagner, Walker, Wang, Ward, Watson, Weber, White, Wilson, Wolf, Wong, Wood, Wright,
    Yamamoto, Yang, Yilmaz, Young, Zhang, Zimmer""")

HELD_OUT_LAST_NAMES = _words("""
    Achebe, Armstrong, Bakker, Balogun, Barlow, Bjork, Bouchard, Caruso, Chowdhury, Cartwright, Dawson,
    Dimitrov, Drummond, Eze, Faulkner, Fonseca, Gallagher, Georgiou, Goldberg, Halloran, Hartley, Haddad,
    Iversen, Jankowski, Jovanovic, Kimura, Kruger, Lambert, Lindqvist, Lombardi, MacLeod, Marchetti, Mbeki,
    Nakagawa, Nyberg, O'Brien, Okafor, Pettersen, Pritchard, Quigley, Radcliffe, Rasmussen, Sandoval, Sokolov,
    Stavros, Tremblay, Underwood, Vandenberg, Villanueva, Whitaker, Winslow, Yamada, Zielinski""")

TRAIN_CITIES = _words("""
    Aarhus, Aberdeen, Accra, Adelaide, Aleppo, Almaty, Amman, Amsterdam, Ankara, Antwerp, Athens, Atlanta,
    Auckland, Austin, Baghdad, Baku, Baltimore, Bangkok, Barcelona, Bari, Basel, Bath, Beirut, Belfast,
    Belgrade, Bergen, Berlin, Bern, Bilbao, Birmingham, Bogotá, Bologna, Bordeaux, Boston, Bradford, Bremen,
    Brest, Brighton, Brisbane, Bristol, Brno, Brussels, Bucharest, Budapest, Buffalo, Bursa, Cádiz, Cairo,
    Calgary, Cambridge, Canberra, Cape Town, Cardiff, Casablanca, Charlotte, Chennai, Chester, Chicago,
    Cincinnati, Cleveland, Cologne, Columbus, Copenhagen, Córdoba, Cork, Coventry, Dakar, Dallas, Damascus,
    Delft, Delhi, Denver, Derby, Detroit, Dhaka, Doha, Dortmund, Dresden, Dubai, Dublin, Dundee, Durban,
    Düsseldorf, Edinburgh, Essen, Exeter, Fargo, Fresno, Gdansk, Geneva, Genoa, Ghent, Glasgow, Granada, Graz,
    Grenoble, Groningen, Hague, Hamburg, Hanoi, Hanover, Harare, Havana, Helsinki, Houston, Hull, Innsbruck,
    Istanbul, Izmir, Jakarta, Kansas City, Karachi, Kathmandu, Kigali, Krakow, Kyoto, La Paz, Lagos, Lahore, Las
    Vegas, Lausanne, Leeds, Leicester, Leipzig, Lille, Lima, Limerick, Linz, Lisbon, Liverpool, London, Long
    Beach, Los Angeles, Louisville, Lublin, Lusaka, Luxembourg, Lyon, Madison, Madrid, Malaga, Manchester,
    Manila, Marseille, Melbourne, Memphis, Mexico City, Miami, Milan, Montpellier, Montreal, Moscow, Mumbai,
    Munich, Nagoya, Nairobi, Nantes, Naples, Nashville, New Delhi, New Orleans, New York, Newcastle, Nice,
    Norwich, Nottingham, Oakland, Odense, Omaha, Oslo, Ottawa, Oxford, Padua, Palermo, Paris, Perth,
    Philadelphia, Phoenix, Pisa, Pittsburgh, Plymouth, Portland, Porto, Portsmouth, Poznan, Prague, Pretoria,
    Quito, Reading, Rennes, Riga, Rio de Janeiro, Riyadh, Rome, Rotterdam, Sacramento, Salt Lake City, Salzburg,
    San Diego, San José, Santa Cruz, São Paulo, Seattle, Seoul, Seville, Shanghai, Sheffield, Sibiu, Singapore,
    Sofia, Southampton, Split, St Albans, Stockholm, Strasbourg, Stuttgart, Swansea, Sydney, Taipei, Tallinn,
    Tampa, Tampere, Tbilisi, Tehran, Tirana, Tokyo, Toledo, Toronto, Toulouse, Trento, Trieste, Tunis, Turin,
    Utrecht, Valencia, Vancouver, Venice, Verona, Vienna, Vigo, Vilnius, Warsaw, Washington, Wellington,
    Winnipeg, Wroclaw, York, Zagreb, Zaragoza, Zurich""")

HELD_OUT_CITIES = _words("""
    Abu Dhabi, Addis Ababa, Albany, Albuquerque, Algiers, Bamako, Baton Rouge, Biarritz, Bratislava, Buenos
    Aires, Cardenas, Cedar Rapids, Chattanooga, Darwin, Dijon, Dunkirk, Eindhoven, El Paso, Freetown, Galway,
    Gothenburg, Halifax, Hiroshima, Hobart, Hong Kong, Inverness, Jaipur, Kampala, Kuala Lumpur, Lancaster,
    Leuven, Lugano, Maastricht, Malmö, Minsk, Mombasa, Montevideo, Nicosia, Osaka, Palm Springs, Parma,
    Reykjavik, Rosario, Rouen, Salem, Sarajevo, Siena, Skopje, Tacoma, Thessaloniki, Topeka, Tromsø, Uppsala,
    Wichita, Yerevan""")

TRAIN_SHELVES: tuple[Shelf, ...] = (
    (
        _words("""
        mug, bowl, plate, teapot, jug, tray, cup, butter dish, pitcher, coaster, salt shaker, egg cup, cake stand,
        mixing bowl, coffee pot, biscuit tin, sugar bowl, serving dish, soup plate"""),
        _words("ceramic, enamel, blue, large, porcelain, stoneware, small, handmade"),
    ),
    (
        _words("""
        kettle, saucepan, ladle, whisk, colander, rolling pin, grater, spatula, wok, peeler, cutting board,
        breadboard, corkscrew, bread box, frying pan, cake tin"""),
        _words("copper, steel, wooden, shiny, lidded"),
    ),
    (
        _words("""
        towel, cushion, blanket, apron, curtain, tablecloth, napkin, pillow, bath mat, tea towel, rug, bedsheet,
        duvet, doormat, oven glove, pot holder, bathrobe, mattress, table runner, seat cover"""),
        _words("linen, cotton, woollen, striped, checked, grey, soft, green, patterned, thick"),
    ),
    (
        _words("""
        rake, trowel, planter, watering can, spade, hose, flower pot, bird feeder, wheelbarrow, garden chair,
        parasol, hammock, lantern, seed tray, bucket, sprinkler, garden gnome, hedge trimmer, window box, fence
        panel"""),
        _words("galvanised, terracotta, plastic, sturdy, weatherproof, black, dark green"),
    ),
    (
        _words("""
        notebook, pencil, envelope, folder, stapler, ruler, eraser, sketchbook, calendar, diary, binder, fountain
        pen, marker, postcard, sticker, desk lamp, whiteboard, paper clip, ink cartridge, wall map, gift card,
        pencil case"""),
        _words("leather, slim, recycled, yellow, pocket, classic, ivory"),
    ),
    (
        _words("""
        hammer, drill, screwdriver, wrench, saw, ladder, toolbox, tape measure, paintbrush, clamp, chisel, spirit
        level, torch, extension cord, padlock, wire brush, work light, paint roller, hand saw, pocket knife"""),
        _words("cordless, heavy, adjustable, electric, compact, magnetic, professional"),
    ),
    (
        _words("""
        puzzle, teddy bear, kite, board game, doll, spinning top, train set, toy car, puppet, building block,
        balloon, model plane, card game, drum, music box, toy boat"""),
        _words("colourful, painted, giant, vintage, educational"),
    ),
    (
        _words("""
        lamp, candle, vase, picture frame, mirror, clock, bookshelf, stool, basket, coat rack, laundry bag, alarm
        clock, light bulb, door handle, side table, wall hook, storage box, photo album, armchair, lampshade, soap
        dish"""),
        _words("round, white, antique, modern, tall, cream, square"),
    ),
    (
        _words("""
        tent, backpack, sleeping bag, compass, water bottle, helmet, raincoat, camping stove, headlamp, bike pump,
        bike lock, walking pole, yoga mat, thermos, lunchbox, tennis ball, skipping rope, picnic blanket, cool box,
        football, tennis racket"""),
        _words("waterproof, lightweight, orange, insulated, foldable"),
    ),
    (
        _words("""
        charger, cable, adapter, keyboard, headset, speaker, webcam, battery, phone case, power bank, mouse pad,
        memory card, radio, monitor, laptop sleeve, remote control, desk fan, toothbrush, toaster, blender"""),
        _words("wireless, portable, silver, rechargeable, mini"),
    ),
    (
        _words("""
        hat, sweater, sock, belt, shirt, jacket, umbrella, beanie, slipper, summer dress, winter coat, glove,
        wallet, handbag, shoe rack, T-shirt"""),
        _words("knitted, red, warm, plain, navy, brown"),
    ),
)

HELD_OUT_SHELVES: tuple[Shelf, ...] = (
    (
        _words(
            "skillet, ramekin, teaspoon, casserole, sieve, carafe, juicer, espresso maker, pepper mill, garlic press"
        ),
        _words("bamboo, marble, nonstick, turquoise"),
    ),
    (_words("quilt, bedspread, pillowcase, handkerchief, tapestry, face cloth"), _words("velvet, embroidered, purple")),
    (
        _words("shovel, compost bin, birdbath, trellis, lawn mower, sun lounger, bench, greenhouse"),
        _words("rustproof, folding"),
    ),
    (_words("crayon, clipboard, glue stick, highlighter, globe, bookmark, typewriter"), _words("laminated, pink")),
    (_words("crowbar, hacksaw, sander, nail gun, mallet, hinge, soldering iron"), _words("rugged, titanium")),
    (_words("rocking horse, frisbee, rattle, trampoline, xylophone"), _words("fluffy, retro")),
    (
        _words("ottoman, chandelier, wardrobe, nightstand, doorbell, footrest, shoehorn, fire screen"),
        _words("oval, rustic, brass"),
    ),
    (_words("kayak, snorkel, canteen, whistle, fishing rod, dumbbell, scooter"), _words("inflatable, reflective")),
    (
        _words("router, microphone, projector, tripod, hard drive, smart plug, calculator"),
        _words("bluetooth, programmable"),
    ),
    (_words("poncho, cardigan, necktie, mitten, swimsuit, waistcoat"), _words("tweed, maroon, reversible")),
)
