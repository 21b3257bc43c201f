// Operands of wgmma's sums d, an array of a thread's registers: NAMES_n the first n as PTX counts them, SUMS_n(0) as asm
// takes them. A product n picks wide has n / 2 of them.

#define NAMES_4 "%0,%1,%2,%3"
#define NAMES_8 NAMES_4 ",%4,%5,%6,%7"
#define NAMES_16 NAMES_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES_32 NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_64 NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define NAMES_96 NAMES_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define NAMES_128 NAMES_96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

#define SUMS_4(i) "+f"(d[(i)]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define SUMS_8(i) SUMS_4(i), SUMS_4((i) + 4)
#define SUMS_16(i) SUMS_8(i), SUMS_8((i) + 8)
#define SUMS_32(i) SUMS_16(i), SUMS_16((i) + 16)
#define SUMS_64(i) SUMS_32(i), SUMS_32((i) + 32)
#define SUMS_96(i) SUMS_64(i), SUMS_32((i) + 64)
#define SUMS_128(i) SUMS_64(i), SUMS_64((i) + 64)
