package main

// category is a kind of thing: the words that asks end in, and its members. A word belongs to one category only,
// and no member of another category could pass for one of this: a question has exactly one right option.
type category struct {
	ask   string // completes "Which of these is ..."
	words string // separated by spaces; the order does not matter, the generator shuffles
}

var english = []category{
	{"a kind of fruit", "apple banana mango peach plum pear grape cherry papaya lemon apricot fig melon guava strawberry blueberry pineapple coconut"},
	{"a kind of bird", "eagle sparrow owl penguin parrot robin crow falcon pigeon flamingo ostrich goose hawk pelican woodpecker seagull swan raven"},
	{"a kind of fish", "salmon tuna trout cod carp herring sardine eel mackerel halibut piranha haddock anchovy sturgeon flounder minnow tilapia snapper"},
	{"a kind of insect", "ant bee beetle butterfly mosquito moth wasp grasshopper dragonfly ladybug termite cockroach hornet locust flea aphid mayfly weevil"},
	{"a kind of mammal", "lion tiger elephant horse cow dog cat rabbit wolf fox deer giraffe zebra monkey camel kangaroo squirrel leopard"},
	{"a kind of metal", "iron copper zinc tin lead nickel aluminum titanium platinum chromium cobalt tungsten steel brass uranium lithium magnesium bronze"},
	{"a country", "France Brazil Japan Kenya Canada Egypt India Norway Peru Spain Italy Germany Mexico China Thailand Greece Sweden Chile"},
	{"a city", "Paris London Tokyo Berlin Madrid Rome Cairo Chicago Moscow Sydney Toronto Vienna Boston Mumbai Beijing Athens Lisbon Dublin"},
	{"a language", "English French Spanish Arabic Russian Hindi Portuguese Korean Italian German Japanese Turkish Dutch Swahili Polish Greek Bengali Latin"},
	{"a kind of vegetable", "carrot potato spinach broccoli onion cabbage lettuce cauliflower radish turnip celery asparagus kale beet leek garlic parsnip artichoke"},
	{"a kind of tool", "hammer saw screwdriver wrench drill pliers chisel axe shovel rake crowbar mallet hoe clamp trowel hacksaw spade pickaxe"},
	{"a musical instrument", "piano guitar violin drum flute trumpet cello harp clarinet saxophone trombone banjo tuba oboe accordion harmonica xylophone mandolin"},
	{"a piece of clothing", "shirt trousers jacket sweater dress skirt socks hat scarf gloves coat shorts vest blouse jeans pajamas hoodie mittens"},
	{"a piece of furniture", "chair table sofa bed desk bookshelf wardrobe cabinet couch stool dresser bench cupboard armchair nightstand crib recliner bookcase"},
	{"a sport", "soccer tennis basketball baseball hockey volleyball golf boxing swimming wrestling rugby badminton skiing fencing archery rowing judo gymnastics"},
	{"a kind of vehicle", "car bus truck bicycle train motorcycle taxi tram van scooter airplane helicopter ambulance tractor ferry yacht submarine canoe"},
	{"a kind of flower", "rose tulip daisy lily orchid daffodil marigold carnation peony poppy jasmine hyacinth begonia dahlia petunia geranium chrysanthemum buttercup"},
	{"a kind of tree", "oak pine maple birch willow cedar elm spruce redwood sycamore cypress poplar sequoia fir beech aspen eucalyptus hemlock"},
	{"a job", "teacher doctor farmer lawyer nurse baker plumber carpenter pilot dentist engineer librarian journalist tailor butcher electrician accountant firefighter"},
	{"a part of the body", "arm leg nose ear knee elbow shoulder finger ankle wrist neck thumb toe hip chin heart liver stomach"},
	{"a drink", "water tea coffee milk juice wine beer lemonade soda cocoa cider whiskey vodka rum champagne brandy espresso milkshake"},
	{"a kind of weather", "rain snow fog storm wind thunder blizzard drizzle sunshine hurricane tornado frost mist sleet lightning breeze drought typhoon"},
	{"a field of study", "mathematics physics chemistry biology history geography algebra geometry economics astronomy philosophy psychology literature sociology calculus statistics botany zoology"},
	{"a shape", "circle square triangle rectangle pentagon hexagon octagon oval cube sphere cone pyramid cylinder rhombus trapezoid ellipse prism parallelogram"},
	{"a color", "red blue green yellow purple pink brown black white gray crimson scarlet beige maroon indigo magenta teal cyan"},
	{"a kind of building", "house church hospital hotel castle museum palace cathedral temple barn library factory skyscraper cottage mosque warehouse stadium theater"},
	{"a member of a family", "mother father sister brother uncle aunt cousin grandmother nephew niece grandfather son daughter husband wife grandson stepmother granddaughter"},
	{"an emotion", "joy anger fear sadness love happiness jealousy pride shame guilt envy hate grief disgust hope excitement surprise worry"},
	{"a disease", "flu malaria cancer measles diabetes pneumonia asthma tuberculosis cholera arthritis polio influenza mumps smallpox bronchitis rabies hepatitis leprosy"},
}

// chinese is asked as "下面哪一个是…？".
var chinese = []category{
	{"水果", "苹果 香蕉 芒果 桃子 梨 葡萄 樱桃 西瓜 菠萝 草莓"},
	{"动物", "狮子 老虎 大象 马 牛 兔子 狼 狐狸 长颈鹿 猴子"},
	{"国家", "法国 巴西 日本 肯尼亚 加拿大 埃及 印度 挪威 西班牙 德国"},
	{"城市", "巴黎 伦敦 东京 柏林 罗马 开罗 莫斯科 悉尼 维也纳 北京"},
	{"乐器", "钢琴 吉他 小提琴 鼓 笛子 小号 大提琴 竖琴 二胡 古筝"},
	{"颜色", "红色 蓝色 绿色 黄色 紫色 粉色 棕色 黑色 白色 灰色"},
	{"家具", "椅子 桌子 沙发 床 书架 衣柜 凳子 茶几 书桌 橱柜"},
	{"职业", "教师 医生 农民 律师 护士 面包师 木匠 飞行员 牙医 记者"},
	{"交通工具", "汽车 公共汽车 卡车 自行车 火车 摩托车 飞机 轮船 地铁 直升机"},
	{"运动", "足球 网球 篮球 排球 游泳 拳击 羽毛球 滑雪 射箭 体操"},
}
