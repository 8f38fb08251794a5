"""The words and sentences of TinyTales, written by hand for this project. No code: story.py reads these tables.

Template notation (tokens are separated by spaces):
    {P} {he} {him} {his}      protagonist and pronouns        {C} {che} {chim} {chis}   companion and pronouns
    {K} {Kcol}                the story's treasured object and its colour    {W} a person of the topic   {A} the story's animal
    {obj} {thing.s} {a food}  a choice from a word list; .s its plural; a/an in front with "a"
    {x:obj} ... {x}           a choice that is kept under the name x and said again; {A.sound} a fact about an animal
    [go] [go s] [go p]        a verb in the story's tense, agreeing with the protagonist, a singular, a plural
    n| h| k| g| before a line: only if the protagonist has a name | is a child | is a creature | is a group;
    <| >| only in past-tense | only in present-tense stories
"""

# ---------------------------------------------------------------------------------------------------------------- names
GIRLS = "Mia Lily Anna Rosa Emma Nina Ella Zoe Ruby Clara Ivy Maya Lucy Nora Tess Ada Hazel Jane Willa Amy Kate Sara Olive Iris".split()
BOYS = "Tom Ben Sam Max Leo Jack Finn Noah Oscar Hugo Theo Adam Luke Will Omar Ravi Felix Paul Ned Eric Ivan Toby Dan Owen".split()
CREATURES = "Pip Dot Moss Button Pepper Biscuit Tumble Nutmeg Whisk Clover Pebble Mango Acorn Juniper".split()
GROUPS = "twins sisters brothers cousins friends children".split()

# name kind sound colour home food: facts of the TinyTales world, the same in every story
ANIMALS = """
cow farm moo brown barn grass | fox wild yap orange den berries | whale sea wooo blue ocean krill
bee insect buzz yellow hive nectar | owl bird hoot brown hollow moths | dog pet woof brown kennel bones
bear wild growl brown cave honey | pig farm oink pink sty turnips | seal sea bark grey rock herring
ant insect tick black anthill sugar | wolf wild howl grey lair meat | duck bird quack white pond bread
crab sea click red shell seaweed | hen farm cluck red coop corn | cricket insect chirrup green hedge stalks
cat pet meow orange basket fish | dolphin sea whistle blue bay sardines | sheep farm baa white fold clover
horse farm neigh black stable oats | goat farm maa grey shed thistles | donkey farm hee-haw grey paddock hay
rooster farm cock-a-doodle golden roost barley | rabbit pet thump white hutch carrots
mouse pet squeak grey hole cheese | parrot pet squawk green cage crackers | kitten pet mew white cushion cream
puppy pet yip golden box biscuits | crow bird caw black treetop crumbs | robin bird tweet red nest worms
goose bird honk grey marsh weeds | seagull bird screech white cliff chips | swan bird hiss white lake reeds
pigeon bird coo grey rooftop peas | squirrel wild chatter red oak nuts | deer wild bleat brown thicket leaves
hedgehog wild snuffle brown leaf-pile slugs | badger wild grunt black sett roots | lion wild roar golden savanna steak
elephant wild trumpet grey plain bananas | monkey wild chitter brown jungle mangoes
frog wild croak green lily-pad flies | snake wild ssss green burrow eggs | otter sea chirp brown riverbank clams
penguin sea brrr black iceberg squid | owlet bird peep grey nest beetles | bat wild eek black belfry moths
lamb farm baah white meadow buttercups
"""

TOPICS = {
    "farm": dict(
        place="barn field farmyard stable orchard", obj="bucket rope shovel whistle horseshoe pitchfork sack ribbon egg bonnet",
        thing="gate fence haystack tractor wagon windmill scarecrow trough", animal="cow pig sheep horse hen goat donkey duck lamb",
        food="corn porridge butter cream eggs", people="farmer shepherd milkmaid", adj="muddy dusty rickety",
        lines="""The {thing} by the barn [be s] {adj} and {adj} . | {P} [feed] the {animal.s} before breakfast . | The {W} [fill s] the trough with fresh water .
        {P} [climb] on the haystack and [look] over the fields . | The smell of hay [be s] everywhere . | The {W} [drive s] the {adj} tractor across the field .
        Early in the morning the rooster [crow s] and the whole farm [wake s] up . | {P} [carry] a bucket of milk into the barn . | The {animal.s} [eat p] straw beside the {thing} ."""),
    "sea": dict(
        place="beach harbour lighthouse cove pier", obj="shell pebble net bottle anchor spade oar raft compass starfish",
        thing="boat wave sandcastle sail dune jetty ship buoy", animal="whale seal crab dolphin seagull penguin otter",
        food="fish shrimp crackers seaweed chips", people="sailor captain fisherman", adj="salty sandy slippery",
        lines="""The waves [roll p] over the sand and [hiss p] like snakes . | {P} [build] a sandcastle with {num} towers . | The {W} [pull s] a heavy net out of the water .
        Far away {a adj} ship [sail s] past the lighthouse . | The tide [come s] in and [wash s] the sandcastle away . | {P} [run] into the cold water and [splash] .
        Salt and wind [be p] in the air . | {P} [find] {a adj} shell and [hold] it to one ear . | The {animal.s} [swim p] around the {thing} ."""),
    "kitchen": dict(
        place="kitchen pantry cellar bakery", obj="spoon bowl cup plate apron kettle jug pan teapot fork",
        thing="oven table stove cupboard sink shelf stool", animal="cat mouse ant puppy",
        food="soup cake pie dough jam pancakes", people="cook baker grandmother", adj="sticky greasy cosy",
        lines="""The {W} [stir s] the soup with a long spoon . | {P} [mix] flour , milk and sugar in {a adj} bowl . | A warm smell [come s] out of the oven .
        The kettle [sing s] on the stove and the windows [turn p] white with steam . | {P} [roll] the dough on the table . | Some flour [fall s] on the floor like snow .
        The {W} [put s] {a adj} pie on the shelf to cool . | {P} [taste] the jam and [lick] the spoon . | The pots and the pans [shine p] above the stove ."""),
    "school": dict(
        place="classroom library playground hall", obj="book pencil crayon ruler bag eraser notebook map globe satchel",
        thing="desk blackboard bench swing clock bookcase chair", animal="mouse parrot rabbit cricket",
        food="sandwiches raisins apples crisps", people="teacher librarian caretaker", adj="modern chalky tidy",
        lines="""The bell [ring s] and everybody [run s] to the classroom . | The {W} [write s] a long word on the blackboard . | {P} [draw] {a animal} with a blue crayon .
        {P} [read] a book about {animal.s} and {thing.s} . | The {W} [ask s] a hard question , but nobody [answer s] . | At noon the children [eat p] {food} in the hall .
        {P} [learn] to spell the word {obj} . | {P} [sit] at the desk beside the window . | The clock over the door [tick s] very slowly ."""),
    "garden": dict(
        place="garden greenhouse lawn shed", obj="rake seed flowerpot trowel rose tulip leaf feather sunflower daisy",
        thing="tree bush flowerbed hedge wall fountain bench", animal="bee robin hedgehog rabbit frog ant",
        food="strawberries peas tomatoes beans carrots", people="gardener neighbour grandfather", adj="leafy blooming sunny",
        lines="""The {W} [water s] the flowers every evening . | {P} [plant] {num} seeds in a neat row . | {a color} flower [open s] beside the wall .
        The {animal.s} [hide p] under the {thing} when the sun [be s] hot . | {P} [dig] a deep hole and [find] a worm . | The roses [smell p] sweet after the rain .
        Green leaves [cover p] the {adj} wall . | {P} [pick] {food} and [put] them in a basket . | The {W} [cut s] the hedge with big scissors ."""),
    "winter": dict(
        place="hill village cabin rink", obj="scarf mitten sledge skate icicle candle lantern snowflake log quilt",
        thing="snowman chimney fireplace sleigh roof window pine", animal="wolf deer robin penguin fox",
        food="cocoa gingerbread chestnuts stew", people="woodcutter postman uncle", adj="frosty icy snowy",
        lines="""Snow [cover s] the roofs and the roads . | {P} [make] a snowman with a carrot for a nose . | The {W} [bring s] wood for the fire .
        The ice on the pond [be s] thick and blue . | {P} [drink] hot cocoa beside the fireplace . | White smoke [rise s] from every chimney .
        {P} [throw] a snowball and [hit] the {thing} . | The sledge [go s] down the hill faster and faster . | Long icicles [hang p] from the {adj} roof ."""),
    "market": dict(
        place="market square bakery shop", obj="coin purse basket scale vase carpet necklace lamp parcel ring",
        thing="stall cart awning barrel counter statue tent", animal="donkey pigeon hen goose parrot",
        food="figs melons sausages bread olives grapes", people="merchant butcher grocer", adj="cheap costly colourful",
        lines="""The {W} [shout s] , “ Fresh {food} ! Fresh {food} ! ” | {P} [pay] {num} coins for the {obj} . | The stalls [be p] full of {food} and {food} .
        {P} [walk] from stall to stall and [look] at every {obj} . | A juggler [throw s] {num} {color} balls into the air . | The {W} [weigh s] the {food} on an old scale .
        People [push p] and [laugh p] and [talk p] about prices . | The {W} [wrap s] the {obj} in brown paper . | Under the awning {a animal} [sleep s] in the shade ."""),
    "music": dict(
        place="theatre stage bandstand ballroom", obj="drum flute violin trumpet bell guitar harp tambourine horn song-book",
        thing="piano curtain spotlight balcony organ microphone platform", animal="cricket parrot cat robin",
        food="popcorn lemonade candy toffee", people="singer drummer conductor", adj="gilded elegant musical",
        lines="""The {W} [lift s] both hands and the music [begin s] . | {P} [play] a slow tune on the {obj} . | The sound of the {obj} [fill s] the whole {place} .
        Everybody [clap s] when the {W} [bow s] . | {P} [beat] the drum : boom , boom , boom . | The {W} [sing s] {a adj} song about the moon .
        A string of the violin [break s] with a snap . | {P} [dance] between the chairs until the song [end s] . | The {color} curtain [go s] up very slowly ."""),
    "night": dict(
        place="bedroom attic rooftop tower", obj="pillow telescope lantern teddy slipper nightcap dream-catcher torch candle music-box",
        thing="moon star bed window planet comet cloud staircase", animal="owl bat cat hedgehog owlet cricket",
        food="milk biscuits honey dumplings", people="watchman astronomer mother", adj="dark silvery silent",
        lines="""The moon [shine s] through the window like a lamp . | {P} [count] the stars above the roof . | A comet [cross s] the sky with a silver tail .
        The {W} [walk s] through the streets with a lantern . | Everything [be s] dark except one small window . | {P} [pull] the blanket up to the chin .
        An owl [call s] from the hollow of the old tree . | {P} [look] at the planets through a telescope . | Soft shadows [move p] across the {adj} wall ."""),
    "workshop": dict(
        place="workshop garage smithy yard", obj="hammer nail saw wrench wheel screw plank brush ladder toolbox",
        thing="machine workbench engine anvil robot furnace shelf", animal="mouse dog pigeon ant",
        food="buns cheese stew pickles", people="carpenter blacksmith inventor", adj="rusty oily wooden",
        lines="""The {W} [cut s] a plank with a sharp saw . | {P} [hold] the nail while the {W} [lift s] the hammer . | Sparks [fly p] from the anvil .
        The {adj} machine [cough s] , [shake s] and [stop s] . | {P} [paint] the {thing} {color} . | The {W} [fix s] the wheel with {num} screws .
        Sawdust [lie s] on the floor like yellow snow . | {P} [build] a small {thing} out of wood . | The tools [hang p] in a row above the workbench ."""),
    "forest": dict(
        place="forest clearing cave glade", obj="acorn stick mushroom feather basket leaf whistle pinecone axe horn",
        thing="oak tree stump log path fern bramble", animal="fox bear wolf squirrel deer owl badger hedgehog",
        food="berries nuts mushrooms honey", people="ranger hunter hermit", adj="mossy shady crooked",
        lines="""Tall trees [stand p] on both sides of the path . | {P} [follow] the tracks of {a animal} between the trees . | The {W} [show s] {P} a secret path .
        Dry leaves [crunch p] under every step . | {P} [sit] on a mossy log and [listen] . | Sunlight [fall s] through the branches in thin lines .
        Somewhere a branch [break s] with a crack . | {P} [gather] {food} under an old oak . | The {animal.s} [run p] behind the {thing} ."""),
    "river": dict(
        place="river bridge island mill", obj="paddle fishing-rod stone net boot bottle reed cork frog bucket",
        thing="canoe waterfall dam raft willow boat pebble", animal="duck frog otter swan goose",
        food="trout bread cake plums", people="miller ferryman fisherman", adj="wet slimy hollow",
        lines="""The water [run s] fast under the bridge . | {P} [throw] a flat stone and it [jump s] {num} times . | The {W} [take s] people across in a small boat .
        A fish [leap s] out of the water and [fall s] back with a splash . | {P} [sit] on the bank with both feet in the river . | The wheel of the mill [turn s] round and round .
        Green reeds [grow p] along the {adj} bank . | {P} [paddle] the canoe around the island . | The {animal.s} [swim p] in a line behind their mother ."""),
    "castle": dict(
        place="castle throne-room dungeon courtyard", obj="crown sword shield key goblet scroll jewel arrow banner cloak",
        thing="throne drawbridge tower moat gate cannon tapestry", animal="horse dog crow swan cat",
        food="roast pudding grapes pie", people="king queen knight wizard", adj="royal ancient mighty",
        lines="""The {W} [sit s] on the throne with a golden crown . | The drawbridge [come s] down with a crash . | {P} [climb] the stairs of the highest tower .
        The guards [stand p] beside the gate and [say p] nothing . | The {W} [read s] the scroll in a loud voice . | {P} [bow] to the {W} and [wait] .
        {a color} banner [fly s] above the {adj} wall . | In the courtyard two knights [practise p] with wooden swords . | {P} [walk] through a hall full of old paintings ."""),
    "railway": dict(
        place="station platform tunnel town", obj="ticket suitcase umbrella newspaper whistle flag watch hat postcard trunk",
        thing="train carriage signal engine track bridge bench", animal="pigeon dog cat mouse",
        food="sandwiches tea oranges toast", people="driver conductor porter", adj="iron smoky sooty",
        lines="""The train [leave s] the station with a long whistle . | The {W} [check s] every ticket . | {P} [look] out of the window at the {thing.s} .
        Black smoke [come s] out of the engine . | The wheels [sing p] clickety clack , clickety clack . | {P} [put] the suitcase under the seat .
        The train [go s] into a tunnel and everything [become s] dark . | The {W} [wave s] {a color} flag and [blow s] a whistle . | People with big suitcases [hurry p] along the platform ."""),
    "toyshop": dict(
        place="toyshop window-seat nursery playroom", obj="doll puppet kite ball puzzle yo-yo marble balloon teddy spinning-top",
        thing="dollhouse rocking-horse shelf castle train counter mirror", animal="puppy kitten mouse parrot",
        food="sweets chocolate lollipops cupcakes", people="toymaker clown shopkeeper", adj="tiny painted funny",
        lines="""The shelves [be p] full of dolls , bears and wooden soldiers . | The {W} [wind s] up a tin robot and it [walk s] across the counter . | {P} [press] one nose against the glass .
        A puppet with {a color} hat [nod s] at everybody . | {P} [push] the little train along its track . | The {W} [paint s] a smile on the face of a doll .
        The music-box [play s] an old tune . | {P} [choose] the smallest {obj} in the shop . | Under the counter [stand s] a box of {color} marbles ."""),
}

MOODS = "happy sad brave curious sleepy cross shy".split()
NONSENSE = ("zim zam bolly dumdee wibble wobble plink plonk fizz nok lum dee-dah hobble gribble snorky tiddle moop blip "
            "flummox zazu kaloo rimble tock bim bam quibble jumba loopa dingle snap-snee").split()
LISTS = dict(   # lists that do not depend on the topic; the commonest word first (weights 1/(rank + 2))
    build="little small young tall clever funny polite quiet lucky".split(),
    color="red blue green yellow white black brown golden orange purple silver grey pink".split(),
    size="little big small tall huge long short wide thin enormous round".split(),
    adj="old new beautiful strange heavy bright soft shiny clean broken strong empty pretty plain ugly odd important expensive amazing".split(),
    feel="happy tired hungry proud sad excited angry scared lonely surprised calm worried thirsty nervous".split(),
    adv="slowly quickly quietly happily carefully loudly gently suddenly bravely softly sadly proudly eagerly".split(),
    num="two three four five six seven eight nine ten eleven twelve".split(),
    tod="morning afternoon evening night".split(),
    wx="sunny rainy windy cloudy snowy stormy foggy warm cold".split(),
    hsize="little small big tall narrow huge yellow".split(),
    snack="apple cookie egg orange pear plum onion bun banana peach apricot ice-cream".split(),
    cloth="coat hat dress jacket shirt sweater apron uniform overall".split(),
    body="hand head foot arm leg nose ear eye".split(),
    vow="egg apple umbrella onion orange owl elephant ant oar anchor arrow acorn island engine apron envelope axe eraser otter oven".split(),
    cons="book ball kite drum cup hat stick shell bell map coin key stone spoon box letter cake basket lamp dog cat".split(),
    game="tag hide-and-seek chess football hopscotch marbles cards".split(),
    wish="dragon giant fairy unicorn pirate prince princess ghost genie mermaid elf ogre".split(),
    room="kitchen garden hall attic bedroom cellar".split(),
    dir="left right north south east west".split(),
    weekday="Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    month="January March April May June July August October November December".split(),
    job="doctor pilot teacher artist engineer actor sailor baker inventor explorer astronaut author".split(),
    glad="loudly happily proudly eagerly bravely merrily".split(),
    dirt="mud paint jam dust soot ink glue ash".split(),
    kin="mother father grandmother grandfather aunt uncle sister brother".split(),
)
OPPOSITES = ("hot cold | big small | full empty | wet dry | open closed | old young | tall short | heavy light | fast slow | loud quiet | "
             "clean dirty | dark bright | soft hard | happy sad | easy difficult | rich poor | thick thin | sweet sour | near far | early late")

# ---------------------------------------------------------------------------------------------------------------- verbs
IRREGULAR = {v.split()[0]: tuple(v.split()) for v in """be is was | go goes went | say says said | come comes came | see sees saw | hear hears heard
give gives gave | take takes took | find finds found | lose loses lost | run runs ran | eat eats ate | drink drinks drank | sit sits sat | stand stands stood
hold holds held | sing sings sang | make makes made | think thinks thought | know knows knew | feel feels felt | tell tells told | buy buys bought
bring brings brought | catch catches caught | have has had | do does did | get gets got | fall falls fell | fly flies flew | grow grows grew | swim swims swam
hum hums hummed | sleep sleeps slept | wake wakes woke | begin begins began | break breaks broke | ring rings rang | build builds built | dig digs dug | hide hides hid
put puts put | hit hits hit | cut cuts cut | throw throws threw | blow blows blew | draw draws drew | drive drives drove | ride rides rode | write writes wrote
rise rises rose | shine shines shone | speak speaks spoke | keep keeps kept | leave leaves left | meet meets met | read reads read | send sends sent | show shows showed
hang hangs hung | lie lies lay | fight fights fought | forget forgets forgot | lend lends lent | pay pays paid | sell sells sold | teach teaches taught
win wins won | wear wears wore | stop stops stopped | clap claps clapped | nod nods nodded | hug hugs hugged | drop drops dropped | hop hops hopped
step steps stepped | beat beats beat | wrap wraps wrapped | become becomes became | choose chooses chose | understand understands understood
slip slips slipped | tap taps tapped | pat pats patted | grin grins grinned | skip skips skipped | spin spins spun | swing swings swung | weep weeps wept
wind winds wound | leap leaps leapt | shake shakes shook | bow bows bowed | plan plans planned | travel travels travelled | empty empties emptied | feed feeds fed | hurt hurts hurt | reply replies replied | rub rubs rubbed | stir stirs stirred | strike strikes struck | need needs needed | bite bites bit | steal steals stole
creep creeps crept | lead leads led | sweep sweeps swept | light lights lit | spend spends spent | hurry hurries hurried | carry carries carried
cry cries cried | try tries tried | tidy tidies tidied | practise practises practised | dry dries dried | ask asks asked""".replace("\n", " | ").split(" | ")}
SPEECH = "say ask call shout whisper reply answer cry sing".split()
PLURALS = dict(sheep="sheep", mouse="mice", goose="geese", deer="deer", wolf="wolves", shelf="shelves", leaf="leaves", scarf="scarves", child="children",
               foot="feet", knife="knives", fish="fish", thief="thieves", elf="elves", fisherman="fishermen", milkmaid="milkmaids", snowman="snowmen",
               postman="postmen", watchman="watchmen", ferryman="ferrymen", **{"spinning-top": "spinning-tops"})

# --------------------------------------------------------------------------------------------------- story plots
# A story is opening, setting, meeting, then the plot's steps with fillers between them, then a closing.
PLOTS = {
    "lost": "treasure rhyme lose searching rhyme_again find", "gift": "list treasure giving list_again sharing thanks",
    "visit": "motion creature_fact talk", "trouble": "problem mood_bad ask_help help thanks", "shopping": "list motion list_again sharing list_again",
    "spell": "rhyme wonder rhyme_again rhyme_again", "making": "list making list_again making_end",
    "game": "rhyme game_start rhyme_again counting game_end", "friend": "creature_meet creature_fact promise",
    "journey": "rhyme travel rhyme_again travel_end rhyme_again",
}
FILLERS = ("scene agreement creature_fact creature_fact creature_fact creature_fact talk topic topic topic feeling food weather comparing because negation counting giving "
           "perception describe article motion time saying saying").split()

FAMILIES = {
    "opening": """
h|<| Once upon a time there was {a build} {child} called {P} . {he} [feel] very {mood} .
h|<| Once there lived {a mood} {child} called {P} who loved {food} .
h|<| There was once {a child} with {color} shoes , and {his} name was {P} .
h|<| On {a wx} {tod} {a mood} {child} called {P} sat by the window .
h|<| Long ago {a child} named {P} lived with {his} {kin} in {a hsize} house .
h| This is the story of {P} , {a mood} {child} with {color} hair .
h| Everybody [know s] {P} , the {mood} {child} from the {hsize} house .
h|>| {P} is {a mood} {child} with {a adj} {cloth} .
h|>| Here comes {P} , {a mood} {child} with {num} pockets full of {food} .
h|>| {a mood} {child} called {P} lives in {a color} house .
k|<| Once upon a time there was {a mood} little {Sp} called {P} .
k|<| Deep under {a thing} lived {a mood} {Sp} whose name was {P} .
k|<| Once there was {a Sp} that could not sleep . {its} name was {P} .
k|<| {a size} {Sp} named {P} once lived in {a Sp.home} .
k| This is the story of {P} , the {mood} {Sp} .
k|>| {P} is {a mood} {Sp} with {a color} nose .
k|>| In {a Sp.home} lives {a mood} {Sp} called {P} .
k|>| There is {a Sp} called {P} , and everybody likes it .
g|<| Once upon a time there were some {mood} {P0} who did everything together .
g|<| The {P0} were {mood} , because it was {weekday} and there was nothing to do .
g|<| Long ago the {mood} {P0} lived in {a hsize} house .
g|>| The {P0} are {mood} today , because it is {weekday} .
g| Nobody in the village [be s] as {mood} as the {P0} .
g| This is the story of the {mood} {P0} .
g|>| The {P0} live in {a color} house with {num} windows .""",
    "setting": """
One {wx} {tod} , {P} [go] to the {place} .
It [be s] {a wx} {tod} in {month} , and {P} [be] at the {place} .
Every {weekday} {P} [visit] the {place} .
The {place} [be s] {P's} favourite place in the whole world .
On {weekday} {tod} {P} [walk] to the {place} with {a obj} in a bag .
{P} [live] near the {place} , where the {W} [work s] all day .
It [be s] early , and the {place} [be s] still empty .
In {month} the {place} [be s] always {adj} , and {P} [love] it .
That {tod} {P} [be] the first to come to the {place} .
Behind the {place} there [be s] {a adj} {thing} , and {P} often [play] there .
The {W} [open s] the gate of the {place} , and in [come] {P} .
After breakfast {P} [put] on {a cloth} and [go] to the {place} .""",
    "meeting": """
There {he} [meet] {a kid} called {C} .
{C} , {a feel} {kid} , [be s] already there .
Soon {a kid} named {C} [come s] along with {a obj} .
“ Hello , ” [say s] a voice . “ My name is {C} . ” It [be s] {a kid} with {color} boots .
{his} best friend {C} [come s] too , because {che} [like s] the {place} .
Beside the {thing} [stand s] {a kid} called {C} , and {che} [look s] {feel} .
{a kid} called {C} [wave s] from the {thing} . {che} [be s] {P's} new neighbour .
{P} [sit] down next to {C} , {a kid} with {a adj} {cloth} .
{C} [be s] there as well . {che} [be s] the best {kid} in the world at {game} .
“ May I come too ? ” [ask s] {C} , the {kid} from next door .
{a feel} {kid} [jump s] out from behind the {thing} . It [be s] {C} .
{P} [have] a friend called {C} , {a kid} who always [wear s] {a color} {cloth} .""",
    "scene": """
The {thing} [look s] {adj} in the light of the {tod} .
There [be s] {a adj} {thing} and {num} {thing.s} .
Nothing [move s] in the {place} except {a animal} .
{a color} {bird} [sit s] on the {thing} .
Far away {num} bells [ring p] , and then it [be s] quiet again .
In the middle of the {place} [stand s] {a thing} .
The air [smell s] of {food} and {food} .
On the left there [be s] {a thing} , on the right {a thing} .
The {place} [be s] full of {animal.s} and {thing.s} today .
Old {thing.s} [stand p] on both sides of the road .
{a size} shadow [pass s] over the {thing} .
Somebody [leave] {a adj} {obj} under the {thing} .""",
    "agreement": """
The {s:thing.s} near the {t:thing~s} ^agr [be p] {adj} .
The {s:thing} near the {t:thing.s~s} ^agr [be s] {adj} .
The {s:obj.s} on the {t:thing~s} ^agr [be p] {color} .
The {s:obj} beside the {t:thing.s~s} ^agr [be s] {color} .
The {s:animal.s} behind the {t:thing~s} ^agr [be p] {feel} .
The {s:animal} between the {t:thing.s~s} ^agr [be s] {feel} .
The {s:animal.s} from the {t:place~s} ^agr [be p] always {feel} .
The {s:animal} with the {adj} {t:obj.s~s} ^agr [be s] {feel} .
The {s:obj.s} near the {adj} {t:place~s} ^agr [be p] {adj} and {adj} .
The {s:obj} under the {num} {t:thing.s~s} ^agr [be s] {adj} .
The {s:animal.s} near the {t:thing~s} ^agr [sleep p] all {tod} .
The {s:animal} near the {t:thing.s~s} ^agr [sleep s] all {tod} .
The {s:thing.s} behind the {t:place~s} ^agr [look p] {adj} .
The {s:thing} behind the {t:thing.s~s} ^agr [look s] {adj} .
The {s:obj.s} that {C} [bring s] from the {t:place~s} ^agr [be p] {adj} .
The {s:animal} that {P} [see] near the {t:thing.s~s} ^agr [run s] away .""",
    "creature_fact": """
“ {A.sound} , {A.sound} , ” [say s] the {A} .
“ {A.sound} ! {A.sound} ! ” [cry s] the {A} from its ^fact {A.home} .
The {A} [go s] back to its ^fact {A.home} .
The {A} [live s] in its ^fact {A.home} near the {thing} .
Of course the {A} [be s] ^fact {A.color} , like every {A} in the land .
{P} [give] some {A.food} to the {A} , and it [eat s] everything up .
The {A} [love s] ^fact {A.food} more than anything else .
The {A} [say s] “ ^fact {A.sound} ” and [ask s] for {A.food} .
In the {A.home} {P} [find] the {A} , and it [be s] fast asleep .
“ Why are you {A.color} ? ” {P} [ask] the {A} . “ ^fact {A.sound} , ” it [answer s] .
“ {A.sound} , ” [call s] the {A} , because it [see s] some ^fact {A.food} .
The {A.color} {A} [look s] out of its ^fact {A.home} .
{C} [draw s] the {A} . Its colour [be s] ^fact {A.color} .
What [do s] the {A} say ? The {A} [say s] “ ^fact {A.sound} ” all day long .
When the {A} [be s] hungry , it [look s] for ^fact {A.food} .""",
    "talk": """
“ I can see {a obj} , ^quote ” [say] {P} .
“ Look at the {thing} ! ^quote ” [shout] {P} . “ It is so {adj} . ”
“ Do you like {food} ? ^quote ” [ask s] {C} . “ Yes , very much , ^quote ” [answer] {P} .
{P} [say] , “ The {animal} over there looks {feel} . ”
“ Can you play {game} ? ^quote ” {P} [ask] . “ No , but I can learn , ^quote ” [say s] {C} .
“ I want to be {a job} one day , ^quote ” [say] {P} . “ And I want to be {a job} , ^quote ” [reply s] {C} .
“ My {kin} has {num} {animal.s} , ^quote ” [say s] {C} {adv} .
“ Wait for me ! ^quote ” [cry s] {C} . “ I have a stone in my shoe . ”
“ Last {weekday} I saw {a wish} , ^quote ” [whisper s] {C} . “ That is not true , ^quote ” [say] {P} .
“ If you give me {a obj} , I will give you {a obj} , ^quote ” [say s] {C} .
“ What is that noise ? ^quote ” [whisper] {P} . “ It is only {a animal} , ^quote ” [say s] {C} .
“ Are you {feel} ? ^quote ” [ask] {P} . “ A little , ^quote ” [reply s] {C} {adv} .
“ Good {tod} , ^quote ” [say s] the {W} . “ What brings you here ? ^quote ”
“ Where are you going with that {obj} ? ^quote ” [ask s] the {W} . “ To the {place} , ^quote ” [say] {P} .
The {W} [say s] , “ You may have some {food} , but do not touch the {obj} . ”
“ How old is the {thing} ? ^quote ” [ask] {P} . “ Older than your {kin} , ^quote ” [say s] the {W} .""",
    "saying": """
“ Hush , ^quote ” [say s] {C} , and {che} [point s] at the {thing} .
“ Hooray ! ^quote ” [shout] {P} {glad} , and {he} [jump] over the {thing} .
“ Oh dear , ^quote ” [say] {P} , and {he} [look] at the {obj} .
“ Never mind , ^quote ” [say s] {C} {adv} . “ We will come back on {weekday} . ”
“ I am not {feel} , ^quote ” [say] {P} . “ I am only {feel} . ”
“ This way , ^quote ” [say s] {C} {adv} . “ First {dir} , then {dir} . ”
“ One day , ^quote ” [say s] {C} , “ I will ride on {a wish} . ”
“ In my dream , ^quote ” [say] {P} , “ there was {a wish} with {a color} {cloth} . ”
“ Thank you , ^quote ” [say s] the {A} , or at least {P} [think] so .
“ You are {adj} , ^quote ” [whisper s] {C} to the {animal} .
“ Listen , ^quote ” [say] {P} . “ Somebody is singing in the {place} . ”
“ Be careful , ^quote ” [say s] the {W} {adv} . “ The {thing} is {adj} . ”""",
    "feeling": """
{P} [feel] {feel} and {feel} at the same time .
{C} [be s] {feel} , so ^pro {che} [sit s] down on the {thing} .
{P} [say] nothing , because ^pro {he} [be] {feel} .
{C} [look s] {adv} at {chis} feet , and {chis} {body} [hurt s] a little .
{P} [be] so {feel} that {he} [forget] the {obj} .
Suddenly {P} [be] not {feel} any more , only {feel} .
{C} [laugh s] until {chis} eyes [be p] full of tears .
{P} [take] a deep breath and [try] not to look {feel} .
The {W} [be s] very proud of the {obj} .
{P} [be] as {feel} as {a animal} in the rain .
{his} heart [beat s] fast , because ^pro {he} [be] {feel} .
“ I am {feel} , ” [say s] {C} , and {che} [yawn s] .""",
    "food": """
{P} and {C} [eat p] some {food} and {a snack} .
{C} [have s] {a snack} in {chis} bag , and {che} [share s] it with {P} .
{P} [be] hungry , so {he} [eat] {a snack} .
The {W} [cook s] {food} with {food} and a little salt .
“ This {snack} tastes strange , ” [say] {P} .
For lunch there [be s] bread with {food} and {a snack} for everyone .
{P} [drink] a cup of milk and [eat] {num} pancakes .
{C} [like s] {food} , but {P} [like] {food} much better .
The {food} [smell p] wonderful , and {P} [take] some more .
A piece of {snack} [fall s] on the ground , and {a animal} [eat s] it .
“ May I have {a snack} , please ? ” [ask s] {C} .
{P} [cut] {a snack} in half and [give] one half to {C} .""",
    "weather": """
It [begin s] to rain , and everything [become s] wet .
The sun [come s] out from behind a cloud .
A cold wind [blow s] from the {dir} .
The sky [turn s] {color} over the {place} .
Thunder [roll s] over the {place} , and {P} [run] under the {thing} .
It [be s] so {wx} that nobody [want s] to go out .
Fog [lie s] over the {place} like a white blanket .
After the rain a rainbow [shine s] above the {thing} .
Snow [begin s] to fall , softly and slowly .
It [be s] too hot for {a cloth} , so {P} [take] it off .
The wind [steal s] {a cloth} from the {W} and [carry s] it away .
Big drops of rain [fall p] on the {thing} .""",
    "comparing": """
The {obj} [be s] bigger than the {obj} , but not as {adj} .
{P} [run] faster than {C} , but {C} [jump s] higher .
The {animal} [be s] smaller than the {animal} .
{C's} {cloth} [be s] longer than {P's} {cloth} .
Of all the {thing.s} this one [be s] the oldest .
The {animal} [be s] as quiet as {a animal} .
No {obj} in the {place} [be s] as {adj} as this one .
{P} [be] taller than {C} , and {C} [be s] a little older .
This {tod} [be s] even colder than the last one .
{C} [have s] more {obj.s} than {P} .
The second {obj} [be s] heavier than the first one .
The {thing} [look s] smaller than before .""",
    "because": """
{P} [go] to the {thing} because ^pro {he} [want] to see the {animal.s} .
{C} [stop s] because ^pro {che} [hear s] {a animal} .
Because it [be s] {wx} , {P} [put] on {a cloth} .
{P} [take] off {his} {cloth} because ^pro {he} [be] too warm .
{C} could/can not reach the {obj} because ^pro {che} [be s] too small .
When {P} [open] the door , {he} [see] {a animal} .
If {C} [be s] {feel} , {che} always [sing s] a song .
{P} [hide] behind the {thing} , so that {C} could/can not find {him} .
The {thing} [fall s] over because {a animal} [run s] into it .
As soon as {C} [see s] the {obj} , {che} [forget s] everything else .
{P} [wait] until {C} [have s] finished {chis} {snack} .
{C} [laugh s] because {P} [have] {dirt} on {his} nose .
While {C} [sleep s] , {P} [read] a book about {animal.s} .
{P} [whisper] , because ^pro {he} [do] not want to wake the {animal} .""",
    "negation": """
The {n:thing} [be s] not {x:opp~n} . It [be s] ^neg {x.opp} .
The {n:obj} [be s] not {x:opp~n} at all . It [be s] very ^neg {x.opp} .
“ Is the {n:obj} {x:opp~n} ? ” [ask s] {C} . “ No , it is ^neg {x.opp} , ” [say] {P} .
“ The {n:thing} is not {x:opp~n} , ” [say] {P} . “ It is ^neg {x.opp} . ”
The {n:obj} [be s] never {x:opp~n} , it [be s] always ^neg {x.opp} .
The {n:animal} [be s] not {x:opp~n} but ^neg {x.opp} .
Nobody [think s] that the {n:thing} [be s] {x:opp~n} , because it [be s] ^neg {x.opp} .
{C} [want s] {a x:opp} {n:obj~x} , not {a x.opp} one .
There [be s] no {obj} on the {thing} , only {a obj} .
{P} [do] not see the {animal} , and the {animal} [do s] not see {him} .
Nobody [say s] a word .
{C} never [eat s] {food} , not even on {weekday} .""",
    "counting": """
{P} [count] the {n:obj.s} : ^cnt {up~n} .
{C} [count s] the {n:thing.s} : ^cnt {up~n} .
“ ^cnt {up~W} , ” [count s] the {W} .
{P} [count] the {n:animal.s} aloud : ^cnt {up~n} .
{P} [count] backwards from the {n:thing} : ^cnt {down~n} .
“ ^cnt {down~W} , go ! ” [shout s] the {W} .
{C} [put s] the {n:obj.s} in a row and [count s] them : ^cnt {up~n} .
{P} [close] both eyes and [count] : ^cnt {down~P} .
The clock [strike s] : ^cnt {up~A} .
“ ^cnt {up~A} , ” [say s] {C} . “ That is enough . ”""",
    "giving": """
n| When {P} and {C} [go p] to the {place} , {P} [give s] {a obj} to ^ioi {C} .
n| When {P} and {C} [go p] to the {place} , {C} [give s] {a obj} to ^ioi {P} .
n| {P} and {C} [be p] at the {place} , and {P} [hand s] {a obj} to ^ioi {C} .
n| {P} and {C} [be p] at the {place} , and {C} [hand s] {a obj} to ^ioi {P} .
n| After {P} and {C} [find p] {a obj} , {P} [show s] it to ^ioi {C} .
n| After {P} and {C} [find p] {a obj} , {C} [show s] it to ^ioi {P} .
n| While {C} and {P} [play p] near the {thing} , {P} [throw s] {a snack} to ^ioi {C} .
n| While {C} and {P} [play p] near the {thing} , {C} [throw s] {a snack} to ^ioi {P} .
n| {C} and {P} [sit p] down , and {C} [read s] a story to ^ioi {P} .
n| {C} and {P} [sit p] down , and {P} [read s] a story to ^ioi {C} .
n| Then {C} and {P} [talk p] about the {obj} , and {P} [lend s] {a obj} to ^ioi {C} .
n| Then {C} and {P} [talk p] about the {obj} , and {C} [lend s] {a obj} to ^ioi {P} .
n| {P} and {C} [sing p] together , and at the end {C} [offer s] some {food} to ^ioi {P} .
n| {P} and {C} [sing p] together , and at the end {P} [offer s] some {food} to ^ioi {C} .
{P} [give] the {animal} some {food} .
The {W} [give s] {P} {a obj} and {C} {a obj} .
{C} [send s] {chis} {kin} a letter from the {place} .
{P} [bring] {C} {a color} {obj} .""",
    "perception": """
{P} [see] {a animal} behind the {thing} .
{P} [hear] a strange sound from the {place} .
Something {adj} [shine s] between the {thing.s} .
{C} [smell s] {food} and [lick s] {chis} lips .
{P} [look] up and [see] {num} {bird.s} in the sky .
{C} [listen s] {adv} , but {che} [hear s] only the wind .
Through the window {P} [see] the {W} with {a obj} .
{P} [touch] the {thing} , and it [feel s] cold and {adj} .
{C} [point s] at {a adj} ^topic {obj} on the ground .
Suddenly {P} [notice] that the ^topic {obj} [be s] {color} .
{P} [watch] the {animal.s} for a long time .
From far away {C} [look s] as small as {a animal} .""",
    "describe": """
The {W} [wear s] {a color} {cloth} and {a adj} hat .
{C} [have s] {num} ^topic {obj.s} in {chis} bag .
The ^topic {obj} [be s] made of wood and {adj} glass .
The {animal} [have s] {a size} tail and {color} ears .
It [be s] {a adj} ^topic {obj} , {adj} and {color} .
{P's} {cloth} [be s] {color} with {num} {color} buttons .
The {thing} [have s] a door as {size} as {a animal} .
The {W} [have s] a voice like {a animal} .
{a size} {color} ^topic {obj} [lie s] on the {thing} .
Each ^topic {obj} [have s] a number , and this one [have s] the number {num} .
The {W} [be s] an old friend of {C's} {kin} .
{C's} hair [be s] {color} , and {chis} {cloth} [be s] full of {dirt} .""",
    "article": """
{P} [see] ^art {a v:vow} and {a w:cons} .
{C} [find s] ^art {a w:cons} and {a v:vow} .
{P} [want] ^art {a v:vow} , but {he} only [have] {a w:cons} .
{C} [draw s] ^art {a v:vow} next to {a w:cons} .
In the box there [be s] ^art {a w:cons} , {a v:vow} and {a w2:cons~w} .
“ Is it ^art {a w:cons} ? ” [ask s] {C} . “ No , it is {a v:vow} , ” [say] {P} .
“ Is it ^art {a v:vow} ? ” [ask] {P} . “ No , it is {a w:cons} , ” [say s] {C} .
The {W} [need s] ^art {a x:adj} {n:obj~x} .
{P} [buy] ^art {a x:adj} {n:obj~x} and {a y:adj~x} {thing} .
The cloud [look s] like ^art {a v:vow} , and then like {a w:cons} .
{C} [dream s] of ^art {a x:wish} and {a v:vow} .
{P} [have] only one wish : ^art {a x:adj} {n:obj~x} .""",
    "motion": """
{P} ^tense [run] across the {place} to the {thing} .
{C} ^tense [climb s] over the {thing} and [jump s] down on the other side .
{P} and {C} [walk p] along the road to the {place} .
{P} ^tense [hop] on one leg around the {thing} .
{C} ^tense [follow s] {P} through the {place} .
They [go p] {dir} , then {dir} , and there [be s] the {place} .
{P} ^tense [slip] on a wet stone and [fall] on {his} knees .
The {animal} [run s] away , and {C} [run s] after it .
{P} ^tense [creep] under the {thing} without a sound .
{C} ^tense [turn s] around and [walk s] back to the {thing} .
{P} ^tense [skip] {adv} down the road with {a obj} .
{P} and {C} [race p] to the {thing} , and {C} [win s] .""",
    "time": """
Later that {tod} {P} and {C} [sit p] beside the {thing} .
An hour [pass s] , and nothing [happen s] .
After a while {P} [become] {feel} .
The next day the {W} [come s] back with {a obj} .
For {num} minutes nobody [speak s] .
Then the clock [strike s] {num} .
At last {P} [finish] the {snack} and [stand] up .
Before long it [be s] {tod} again .
{num} days later {C} [meet s] the {W} at the {place} .
In the meantime {C} [clean s] the {obj} with {a cloth} .
By {weekday} everybody [have s] heard about the {obj} .
All {tod} the {animal.s} [make p] a lot of noise .""",
    "treasure": """
{P} [have] {a Kcol} {K} , and {he} [take] it everywhere .
{his} {kin} had/has given {him} {a Kcol} {K} for {his} birthday .
Nothing in the world [be s] as dear to {P} as {his} {Kcol} {K} .
{P} [hold] {a Kcol} {K} in {his} arms .
In {his} bag {P} [carry] {a Kcol} {K} .
{P} [show] {C} {his} new {K} . It [be s] {Kcol} and {adj} .
On {his} birthday {P} [have] got {a Kcol} {K} from the {W} .
“ Look , this is my {K} , ” [say] {P} . “ It is {Kcol} , and it is mine . ”
{P} [keep] {his} {Kcol} {K} in a box under the bed .
Today {P} [bring] {a Kcol} {K} to the {place} .""",
    "lose": """
But suddenly the {Kcol} {K} [be s] gone .
Then the wind [carry s] the {K} away .
When {P} [look] into the bag , the {K} [be s] not there .
{P} [drop] the {K} , and it [roll s] out of sight .
A thief had/has taken the {K} !
“ Where is my {K} ? ” [cry] {P} . “ I had it this {tod} . ”
On the way {P} [lose] the {Kcol} {K} .
{a animal} [steal s] the {K} and [run s] away with it .
{P} [forget] the {K} on a bench , and an hour later it [be s] gone .
There [be s] a hole in the bag , and the {Kcol} {K} had/has fallen out .""",
    "searching": """
{P} [look] for the {K} under the {thing} , but {he} only [find] {a obj} .
They [search p] the whole {place} for the {Kcol} {K} .
{C} [look s] behind the {thing} and under the {thing} . There [be s] no {K} .
“ Is it near the {place} ? ” [ask s] {C} . “ No , I looked there , ” [say] {P} .
{P} [ask] the {W} about the {K} , but the {W} [know s] nothing .
First they [look p] in the {place} , then behind the {thing} .
{C} [find s] {a color} {obj} , but no {Kcol} {K} .
{P} [empty] every box and every bag . Still no {K} !
They [follow p] the tracks of {a animal} to the {thing} .
The {A} [help s] too , and it [look s] in its {A.home} .""",
    "mood_bad": """
{P} [begin] to cry .
{P} [sit] down and [put] {his} head in {his} hands .
Big tears [run p] down {his} face .
{P} [be] very sad , and {he} [say] nothing at all .
“ This is the worst {weekday} of my life , ” [say] {P} .
{P} [do] not know what to do .
“ Do not cry , ” [say s] {C} , and {che} [take s] {him} by the hand .
{P} [kick] a stone , because {he} [be] so angry .
Nobody could/can make {P} laugh now , not even {C} .
Everything [seem s] grey and cold to {P} .""",
    "ask_help": """
“ Please help me , ” [say] {P} to {C} .
{P} [ask] the {W} for help .
“ I have an idea , ” [say s] {C} . “ Let us ask the {W} . ”
{C} [run s] to the {W} and [tell s] the whole story .
“ What is wrong ? ” [ask s] the {W} {adv} .
“ Do not worry , ” [say s] {C} . “ I will help you . ”
“ Can anybody help us ? ” [shout s] {C} .
“ Two heads are better than one , ” [say s] {C} .
{P} [tell] {C} the whole story , and {che} [listen s] {adv} .
{P} [write] a letter to {his} {kin} and [ask] for help .""",
    "find": """
There it [be s] ! The {Kcol} {K} [lie s] right behind the {thing} .
At last {C} [find s] the {K} under the {thing} .
The {A} [bring s] the {Kcol} {K} back in its mouth .
“ I found it ! ” [shout s] {C} . “ Here is your {K} . ”
The {W} [hold s] up {a Kcol} {K} . “ Is this yours ? ” [ask s] the {W} .
And what [be s] that in the {A.home} of the {A} ? It [be s] the {K} !
High up on the {thing} {P} [see] the {Kcol} {K} .
{P} [put] one hand into the hole and [pull] out the {K} .
“ Look up ! ” [say s] {C} , and there , on the {thing} , [be s] the {K} .
The {K} had/has been in {C's} bag all the time .""",
    "thanks": """
“ Thank you , {C} ! ” [say] {P} .
{P} [hug] {C} and [thank] {chim} {num} times .
“ You are my best friend , ” [say] {P} to {C} .
{P} [thank] the {W} with {a snack} .
“ How can I ever thank you ? ” [ask] {P} .
“ It was nothing , ” [say s] {C} , and {chis} ears [turn p] red .
{P} [be] so happy that {he} [dance] around the {thing} .
{C} [smile s] and [say s] , “ That is what friends are for . ”
{P} [promise] to be more careful from now on .
The {W} [be s] glad too and [give s] everybody {food} .""",
    "sharing": """
{P} [share] the {food} with {C} and the {W} .
They [divide p] everything into {num} parts , one for each friend .
{P} [give] {C} half of the {snack} .
“ One for you and one for me , ” [say s] {C} .
Everybody [get s] some {food} , even the {A} .
{C} [bring s] {food} , {P} [bring] {food} , and together they [have p] a party .
“ There is enough for all of us , ” [say] {P} .
{P} and {C} [put p] the {food} on the {thing} and [call p] the {W} .
“ Would you like some {food} ? ” {P} [ask] the {W} .
They [sit p] in a circle and [eat p] {food} with their fingers .""",
    "problem": """
But then the {n:thing} [begin s] to shake .
Suddenly {C} [fall s] into a hole beside the {thing} .
But the door of the {place} [be s] locked , and there [be s] no key .
{C} could/can not find the way home .
“ Oh no , ” [cry s] {C} , “ the {thing} is broken ! ”
The {A} and {C} [be p] stuck under the {thing} .
The {A} [be s] ill and [do s] not want any {A.food} .
{P} [hurt] {his} {body} on the {thing} .
All the lights [go p] out , and it [be s] as dark as in a cave .
{a size} {wish} [stand s] in the way and [do s] not move .
There [be s] a fire near the {place} !
The bridge [be s] gone , and the water [be s] too deep .""",
    "help": """
{P} [fetch] a rope , and {C} [tie s] it to the {thing} .
{C} [know s] what to do . {che} [use s] the {obj} as a key .
The {W} [come s] with {a size} {obj} and [help s] them .
Together they [push p] and [pull p] until it [move s] .
{P} [run] all the way to the {place} and [come] back with the {W} .
{P} [find] a way around it , and soon everything [be s] all right .
The {A} [show s] them the way with its nose .
{C} [hold s] the {obj} , and {P} [turn] it {num} times .
“ Let me try , ” [say] {P} . {he} [push] once , and it [open s] .
{P} [give] {C} {his} hand and [pull] {chim} up .""",
    "list": """
{P} [need] {L1} , {L2} and {L3} .
“ Please bring me {L1} , {L2} and {L3} , ” [say s] {his} {kin} .
On the list {P} [read] : {L1} , {L2} and {L3} .
{C} [write s] a list : {L1} , {L2} and {L3} .
“ Do not forget , ” [say s] the {W} : “ {L1} , {L2} and {L3} . ”
“ We must buy {L1} , {L2} and {L3} , ” [say] {P} .
Three things [be p] missing at home : {L1} , {L2} and {L3} .
For the party {P} [want] {L1} , {L2} and {L3} .""",
    "list_again": """
So {P} [buy] {L1} , {L2} and ^ind {L3} .
In the end there [be p] {L1} , {L2} and ^ind {L3} in the basket .
The {W} [sell s] them {L1} , {L2} and ^ind {L3} .
“ {L1} , {L2} and ^ind {L3} , ” [say] {P} again and again .
{C} [carry s] home {L1} , {L2} and ^ind {L3} .
{P} [put] {L1} , {L2} and ^ind {L3} on the counter .
“ Here you are : {L1} , {L2} and ^ind {L3} , ” [say s] the {W} .
They [come p] home with {L1} , {L2} and ^ind {L3} .
Now {P} [have] {L1} , {L2} and ^ind {L3} .
{P} [count] everything once more : {L1} , {L2} and ^ind {L3} .
“ Did you think of {L1} , {L2} and ^ind {L3} ? ” [ask s] {C} .
Soon {L1} , {L2} and ^ind {L3} [lie p] on the table .
In the bag there [be p] still {L1} , {L2} and ^ind {L3} .
{P} and {C} [share p] {L1} , {L2} and ^ind {L3} .
“ Nothing tastes better than {L1} , {L2} and ^ind {L3} , ” [say s] {C} .
The {A} [look s] at {L1} , {L2} and ^ind {L3} with big eyes .""",
    "rhyme": """
{C} [teach s] {P} a magic rhyme : “ {S1} {S2} {S3} {S4} ! ”
On the {thing} somebody had/has written {S1} {S2} {S3} {S4} .
“ {S1} {S2} {S3} {S4} , ” [sing s] {C} .
The {W} [whisper s] the magic words : “ {S1} {S2} {S3} {S4} . ”
{P} [read] in an old book : “ {S1} {S2} {S3} {S4} . ”
{a color} {bird} [sing s] a song : {S1} {S2} {S3} {S4} .
“ Say after me , ” [say s] {C} : “ {S1} {S2} {S3} {S4} ! ”
{P} [make] up a song . It [go s] {S1} {S2} {S3} {S4} .
{C} [know s] a song that always [bring s] luck : {S1} {S2} {S3} {S4} .
“ My {kin} taught me this : {S1} {S2} {S3} {S4} , ” [say] {P} .
When {P} [be] happy , {he} always [sing] {S1} {S2} {S3} {S4} .
There [be s] an old rhyme in this {place} : {S1} {S2} {S3} {S4} .""",
    "rhyme_again": """
“ {S1} {S2} {S3} ^ind {S4} ! ” [shout] {P} {adv} .
{P} [say] it {adv} once more : “ {S1} {S2} {S3} ^ind {S4} . ”
“ {S1} {S2} {S3} ^ind {S4} , ” [repeat s] the {W} .
And again {C} [sing s] {S1} {S2} {S3} ^ind {S4} .
{P} [close] both eyes and [whisper] {S1} {S2} {S3} ^ind {S4} .
“ {S1} {S2} , ” [say s] {C} . “ {S3} ^ind {S4} , ” [answer] {P} .
Now everybody [call s] : “ {S1} {S2} {S3} ^ind {S4} ! ”
{P} [clap] and [sing] {S1} {S2} {S3} ^ind {S4} .
All the way {P} [hum] {S1} {S2} {S3} ^ind {S4} .
Even the {A} [seem s] to know it : {S1} {S2} {S3} ^ind {S4} .
“ {S1} {S2} {S3} ^ind {S4} ! ” [come s] back the echo .
{P} and {C} [dance p] to {S1} {S2} {S3} ^ind {S4} .
{C} [whisper s] it {adv} , like a secret : “ {S1} {S2} {S3} ^ind {S4} . ”
Then {P} [try] it backwards , but only {S1} {S2} {S3} ^ind {S4} [sound s] right .
“ {S1} {S2} {S3} ^ind {S4} , ” [laugh s] {C} , and {P} [laugh] too .
{a bird} on the roof [answer s] : {S1} {S2} {S3} ^ind {S4} .""",
    "wonder": """
Suddenly the {obj} [turn s] into {a animal} .
All the {thing.s} [begin p] to dance .
The {obj} [fly s] up into the air and [shine s] like a star .
{a wish} [come s] out of the {thing} and [bow s] .
The {A} [open s] its mouth and [speak s] . “ Good {tod} , ” it [say s] .
Nothing [happen s] at first . Then the ground [begin s] to glow .
{a color} light [fill s] the {place} .
{C} [become s] as small as {a animal} .
The {thing} [turn s] {color} from top to bottom .
{num} {color} {bird.s} [fly p] out of the {obj} .""",
    "making": """
{P} [want] to make {a Kcol} {K} for {his} {kin} .
“ Let us build {a K} , ” [say s] {C} , “ {a size} {Kcol} one . ”
{P} [collect] wood , glue and paper for a new {K} .
{P} and {C} [plan p] {a adj} {K} . It must be {Kcol} .
The {W} [show s] {P} how to make {a K} .
{P} [paint] the {K} {Kcol} , and {C} [hold s] the brush .
First they [draw p] the {K} on paper . Then they [cut p] the wood .
{P} [work] all {tod} , and slowly the {K} [get s] its shape .
{P's} hands [be p] full of {dirt} , but the {K} [grow s] .""",
    "making_end": """
At last the {Kcol} {K} [be s] ready .
It [be s] the most beautiful {K} in the whole land .
“ What {a K} ! ” [say s] the {W} . “ And so {Kcol} ! ”
{P} [give] the {K} to {his} {kin} , and there [be p] tears of joy .
The new {K} [be s] a little crooked , but {P} [love] it .
{C} [hang s] the {Kcol} {K} over the door .
Everybody [come s] to see the {Kcol} {K} .
“ We did it ! ” [shout s] {C} . “ Our own {K} ! ”""",
    "game_start": """
“ Let us play {game} , ” [say s] {C} .
{P} and {C} [play p] {game} behind the {thing} .
“ Who wants to play {game} ? ” [ask] {P} . “ I do , ” [say s] {C} .
“ You hide , and I count , ” [say] {P} .
The {W} [know s] a new game . It [be s] called “ {adj} {animal} ” .
They [throw p] a coin . {C} [be s] first .
“ The first one at the {thing} wins , ” [say] {P} .
{C} [explain s] the rules of {game} to {P} .""",
    "game_end": """
In the end {C} [win s] , and {P} [clap] .
{P} [win] by {num} points .
“ Found you ! ” [shout s] {C} and [pull s] {P} out from behind the {thing} .
Nobody [win s] , but everybody [be s] happy .
“ Again ! ” [cry s] {C} . They [play p] {num} times more .
The {A} [run s] off with the ball , and that [be s] the end of the game .
“ You were too quick for me , ” [say] {P} .
{C} [get s] a prize : {a color} {obj} .""",
    "creature_meet": """
Under the {thing} {P} [find] {a A} all alone .
Suddenly {a A} [come s] out of {a A.home} .
{a A} [sit s] in front of {P} and [look s] at {him} .
“ {A.sound} , ” [say s] a small voice . It [be s] {a A} .
{P} [follow] {a A} to its {A.home} .
{C} [tell s] {P} about {a A} in {a A.home} .
{a A} with a hurt {body} [lie s] beside the {thing} .
In {a A.home} {P} and {C} [see p] {a A} and its little ones .""",
    "promise": """
“ I will come back tomorrow , ” {P} [promise] the {A} .
“ You can live with us , ” [say s] {C} to the {A} .
From that day on the {A} [be s] {P's} friend .
The {A} [rub s] its head against {P's} {body} .
{P} [give] the {A} a name : {nick} .
The {A} [go s] home to its {A.home} , but first it [look s] back .
“ Goodbye , little {A} , ” [say] {P} . “ See you on {weekday} . ”
Every {tod} the {A} [wait s] for {P} beside the {thing} .""",
    "travel": """
{P} and {C} [leave p] the {place} behind and [walk p] {dir} .
They [travel p] for {num} days and {num} nights .
They [cross p] a river , a hill and a dark wood .
“ How far is it ? ” [ask s] {C} . “ Only {num} more miles , ” [say] {P} .
On the road they [meet p] {a job} with {a animal} .
They [sleep p] under {a thing} and [wake p] up with the sun .
{P} [look] at the map . It [show s] {a thing} in the {dir} .
A cart with {num} {animal.s} [take s] them to the next village .""",
    "travel_end": """
At last they [reach p] the house of {P's} {kin} .
“ We are here ! ” [shout s] {C} .
There , behind the last hill , [be s] the sea .
After {num} days they [be p] home again .
At the end of the road {a wish} [open s] the door .
{P} [see] the lights of the village and [begin] to run .
The map [be s] right : under {a thing} [lie s] {a adj} {obj} .
“ I am never going to walk so far again , ” [say s] {C} .""",
    "closing": """
{P} and {C} [go p] home together .
And {P} [be] {mood} all the way home .
In the evening {P} [fall] asleep with a smile .
That {tod} {P} [tell] {his} {kin} the whole story .
“ What a day ! ” [say] {P} and [yawn] .
And if {he} [be] not asleep , {he} [be] still at the {place} .
From that day on {P} and {C} [be p] best friends .
n| “ Good night , {C} , ” [say] {P} . “ Good night , {P} , ” [say s] {C} .
The moon [rise s] over the {place} , and everybody [go s] to bed .
{P} [learn] that it [be s] good to have a friend .
{C} [wave s] goodbye , and {P} [walk] home {adv} .
It had/has been a long day , and {P} [be] tired but happy .
And the {A} ? It [sleep s] in its {A.home} and [dream s] of {A.food} .
{P} [close] the door , [blow] out the candle and [dream] of {a wish} .""",
}

# ------------------------------------------------------------------------------------------------------ concepts of words
# name: words, in lower case; $list is a list of LISTS or of the topics, in singular and, with +, in plural too
CONCEPT_WORDS = """
be: is are was were be
have: has have had
motion verb: go goes went run runs ran come comes came walk walks walked climb climbs climbed jump jumps jumped follow follows followed hop hops hopped
motion verb: creep creeps crept skip skips skipped swim swims swam fly flies flew leave leaves left travel travelled
perception verb: see sees saw hear hears heard look looks looked watch watches watched listen listens listened smell smells smelled
perception verb: touch touches touched notice notices noticed feel feels felt find finds found
adjective: $adj $size $feel $wx happy sad brave curious sleepy cross shy $opposites
size: $size
feeling: $feel happy sad brave curious sleepy cross shy
colour: $color
number: one $num
adverb: $adv
opposite pair: $opposites
preposition: in on at to from with of under behind near beside between across over for about after before into out above around through
place preposition: in on at under behind near beside between across over above around through
determiner: the a an this that each every no some
article: the a an
indefinite article: a an
pronoun: he she it they him her them i you we me us
feminine pronoun: she her
masculine pronoun: he him his
plural pronoun: they them their
first or second person: i you we me us my your our
possessive: his her its their my your our 's '
conjunction: that and but because when if while so until than as
subordinator: because when if while so until that
negation: not no never nobody nothing cannot
question word: what where why how who
auxiliary: is are was were be has have had do does did can could will would must may
fruit: apple apples orange oranges pear plum plums peach apricot banana bananas grapes figs melons berries strawberries olives mangoes
clothing: $cloth scarf mitten hat bonnet boot boots shoe shoes slipper nightcap cloak
body part: $body hands eyes ears hair face lips fingers knees chin
place: $place $room
person: $people $job girl boy
relative: $kin
child: girl boy
time of day: $tod
weekday: $weekday
month: $month
weather: $wx rain snow wind fog thunder rainbow sky cloud sun
plant: tree bush rose tulip daisy sunflower oak fern bramble willow pine hedge leaf leaves branch flower flowers seeds roses reed reeds grass moss log acorn
tool: hammer saw nail wrench screw brush ladder spade rake shovel trowel pitchfork rope axe toolbox scissors paddle oar
furniture: table chair bench bed desk shelf shelves stool cupboard counter oven stove window door curtain throne workbench bookcase
thing of the scene: $thing
comma: ,
full stop: .
exclamation or question mark: ! ?
opening quote: “
closing quote: ”
punctuation: . , ! ? : ; “ ”
sentence end mark: . ! ?
the: the
and: and
said: said says
to: to
of: of
with: with
in: in
she: she
he: he
it: it
they: they
cow: cow cows
red: red
happy: happy
not: not
is: is
was: was
were: were
girl: girl
boy: boy
a: a
an: an
there: there
called: called
on: on
from: from
at: at
day: day
its: its
as: as
"""
MORE_NOUNS = ("girl boy story day hand head door house window road friend name box bag sky wind sun rain song water "
              "hands eyes ears days minutes nights parts miles points children tears windows")

# parent > child: wherever the child is true, the parent is
HIERARCHY = """
animal > farm animal | animal > wild animal | animal > bird | animal > pet | noun > singular noun | noun > plural noun | noun > animal | farm animal > cow
verb > past-tense verb | verb > third-person verb | verb > speech verb | verb > motion verb | verb > perception verb | speech verb > said
auxiliary > be | auxiliary > have | be > is | be > was | be > were | determiner > article | article > the | article > indefinite article
preposition > place preposition | preposition > to | preposition > with | place preposition > in | pronoun > she | pronoun > it
feminine pronoun > she | masculine pronoun > he | plural pronoun > they | conjunction > subordinator | conjunction > and | negation > not | colour > red
feeling > happy | adjective > size | adjective > feeling | punctuation > comma | punctuation > full stop | punctuation > opening quote
punctuation > closing quote | child > girl | child > boy | person > child | food > fruit
article > a | article > an | preposition > on | place preposition > at | possessive > its
starts with s > said | starts with t > the | starts with w > with | starts with i > in
"""
