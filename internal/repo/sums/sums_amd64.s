#include "textflag.h"

// Two chains of rounds side by side, with the SHA instructions. Each instruction of one chain waits for
// the one before it; the other chain fills the time.

// The constants of SHA-256: FIPS 180-4, 4.2.2.
DATA k256<>+0(SB)/8, $0x71374491428a2f98
DATA k256<>+8(SB)/8, $0xe9b5dba5b5c0fbcf
DATA k256<>+16(SB)/8, $0x59f111f13956c25b
DATA k256<>+24(SB)/8, $0xab1c5ed5923f82a4
DATA k256<>+32(SB)/8, $0x12835b01d807aa98
DATA k256<>+40(SB)/8, $0x550c7dc3243185be
DATA k256<>+48(SB)/8, $0x80deb1fe72be5d74
DATA k256<>+56(SB)/8, $0xc19bf1749bdc06a7
DATA k256<>+64(SB)/8, $0xefbe4786e49b69c1
DATA k256<>+72(SB)/8, $0x240ca1cc0fc19dc6
DATA k256<>+80(SB)/8, $0x4a7484aa2de92c6f
DATA k256<>+88(SB)/8, $0x76f988da5cb0a9dc
DATA k256<>+96(SB)/8, $0xa831c66d983e5152
DATA k256<>+104(SB)/8, $0xbf597fc7b00327c8
DATA k256<>+112(SB)/8, $0xd5a79147c6e00bf3
DATA k256<>+120(SB)/8, $0x1429296706ca6351
DATA k256<>+128(SB)/8, $0x2e1b213827b70a85
DATA k256<>+136(SB)/8, $0x53380d134d2c6dfc
DATA k256<>+144(SB)/8, $0x766a0abb650a7354
DATA k256<>+152(SB)/8, $0x92722c8581c2c92e
DATA k256<>+160(SB)/8, $0xa81a664ba2bfe8a1
DATA k256<>+168(SB)/8, $0xc76c51a3c24b8b70
DATA k256<>+176(SB)/8, $0xd6990624d192e819
DATA k256<>+184(SB)/8, $0x106aa070f40e3585
DATA k256<>+192(SB)/8, $0x1e376c0819a4c116
DATA k256<>+200(SB)/8, $0x34b0bcb52748774c
DATA k256<>+208(SB)/8, $0x4ed8aa4a391c0cb3
DATA k256<>+216(SB)/8, $0x682e6ff35b9cca4f
DATA k256<>+224(SB)/8, $0x78a5636f748f82ee
DATA k256<>+232(SB)/8, $0x8cc7020884c87814
DATA k256<>+240(SB)/8, $0xa4506ceb90befffa
DATA k256<>+248(SB)/8, $0xc67178f2bef9a3f7
GLOBL k256<>(SB), (NOPTR+RODATA), $256

// Byte orders: the words of SHA-256 in place, those of SHA-1 in reverse.
DATA flip256<>+0(SB)/8, $0x0405060700010203
DATA flip256<>+8(SB)/8, $0x0c0d0e0f08090a0b
GLOBL flip256<>(SB), (NOPTR+RODATA), $16
DATA flip1<>+0(SB)/8, $0x08090a0b0c0d0e0f
DATA flip1<>+8(SB)/8, $0x0001020304050607
GLOBL flip1<>(SB), (NOPTR+RODATA), $16

// Four rounds of SHA-256, for which s and t hold the state in the order of the instructions (ABEF, CDGH).
// m0 is the present quarter of the message, m1 the next one, m3 the one before; X0 is what the
// instruction takes as its third operand. FIRST and READ are for the 16 words of the block itself,
// LATE for the words that follow from them.
#define ROUNDS256(g, s, t, m) \
	MOVO        m, X0; \
	PADDD       (16*g)(AX), X0; \
	SHA256RNDS2 X0, s, t

#define FINISH256(s, t) \
	PSHUFD      $0x0e, X0, X0; \
	SHA256RNDS2 X0, t, s

#define READ256(g, p, m) \
	MOVOU  (16*g)(p), m; \
	PSHUFB flip256<>(SB), m

#define NEXT256(m, m1, m3, tmp) \
	MOVO       m, tmp; \
	PALIGNR    $4, m3, tmp; \
	PADDD      tmp, m1; \
	SHA256MSG2 m, m1

#define FIRST256(g, p, s, t, m) \
	READ256(g, p, m); \
	ROUNDS256(g, s, t, m); \
	FINISH256(s, t)

#define SECOND256(g, p, s, t, m, m3) \
	FIRST256(g, p, s, t, m); \
	SHA256MSG1 m, m3

#define FOURTH256(g, p, s, t, m, m1, m3, tmp) \
	READ256(g, p, m); \
	LATE256(g, s, t, m, m1, m3, tmp)

#define LATE256(g, s, t, m, m1, m3, tmp) \
	ROUNDS256(g, s, t, m); \
	NEXT256(m, m1, m3, tmp); \
	FINISH256(s, t); \
	SHA256MSG1 m, m3

#define LAST256(g, s, t, m, m1, m3, tmp) \
	ROUNDS256(g, s, t, m); \
	NEXT256(m, m1, m3, tmp); \
	FINISH256(s, t)

#define END256(g, s, t, m) \
	ROUNDS256(g, s, t, m); \
	FINISH256(s, t)

#define LOAD256(h, s, t, tmp) \
	MOVOU   (h), s; \
	MOVOU   16(h), t; \
	PSHUFD  $0xb1, s, s; \
	PSHUFD  $0x1b, t, t; \
	MOVO    s, tmp; \
	PALIGNR $8, t, s; \
	PBLENDW $0xf0, tmp, t

#define STORE256(h, s, t, tmp) \
	PSHUFD  $0x1b, s, s; \
	PSHUFD  $0xb1, t, t; \
	MOVO    s, tmp; \
	PBLENDW $0xf0, t, s; \
	PALIGNR $8, tmp, t; \
	MOVOU   s, (h); \
	MOVOU   t, 16(h)

// Four rounds of SHA-1: abcd, and e as the instructions want it; b becomes the e of the next four.
// f is the function of the rounds, m the present quarter of the message, m1 the next, m2 the one after
// it, m3 the one before.
#define ROUNDS1(f, abcd, a, b, m) \
	SHA1NEXTE m, a; \
	MOVO      abcd, b; \
	SHA1RNDS4 $f, a, abcd

#define READ1(g, p, m) \
	MOVOU  (16*g)(p), m; \
	PSHUFB flip1<>(SB), m

#define LATE1(f, abcd, a, b, m, m1, m2, m3) \
	SHA1NEXTE m, a; \
	MOVO      abcd, b; \
	SHA1MSG2  m, m1; \
	SHA1RNDS4 $f, a, abcd; \
	SHA1MSG1  m, m3; \
	PXOR      m, m2

// func both(h256 *[8]uint32, h1 *[5]uint32, p256, p1 *byte, blocks int)
TEXT ·both(SB), NOSPLIT, $64-40
	MOVQ h256+0(FP), DI
	MOVQ h1+8(FP), R8
	MOVQ p256+16(FP), SI
	MOVQ p1+24(FP), R9
	MOVQ blocks+32(FP), DX
	LEAQ k256<>(SB), AX
	LOAD256(DI, X1, X2, X7)
	MOVOU  (R8), X8
	PSHUFD $0x1b, X8, X8
	MOVL   16(R8), BX
	PXOR   X9, X9
	PINSRD $3, BX, X9

bothLoop:
	MOVOU X1, 0(SP)
	MOVOU X2, 16(SP)
	MOVOU X8, 32(SP)
	MOVOU X9, 48(SP)
	READ1(0, R9, X11)
	PADDD     X11, X9
	MOVO      X8, X10
	SHA1RNDS4 $0, X9, X8
	FIRST256(0, SI, X1, X2, X3)
	READ1(1, R9, X12)
	ROUNDS1(0, X8, X10, X9, X12)
	SHA1MSG1  X12, X11
	SECOND256(1, SI, X1, X2, X4, X3)
	READ1(2, R9, X13)
	ROUNDS1(0, X8, X9, X10, X13)
	SHA1MSG1  X13, X12
	PXOR      X13, X11
	SECOND256(2, SI, X1, X2, X5, X4)
	READ1(3, R9, X14)
	LATE1(0, X8, X10, X9, X14, X11, X12, X13)
	FOURTH256(3, SI, X1, X2, X6, X3, X5, X7)
	LATE1(0, X8, X9, X10, X11, X12, X13, X14)
	LATE256(4, X1, X2, X3, X4, X6, X7)
	LATE1(1, X8, X10, X9, X12, X13, X14, X11)
	LATE256(5, X1, X2, X4, X5, X3, X7)
	LATE1(1, X8, X9, X10, X13, X14, X11, X12)
	LATE256(6, X1, X2, X5, X6, X4, X7)
	LATE1(1, X8, X10, X9, X14, X11, X12, X13)
	LATE256(7, X1, X2, X6, X3, X5, X7)
	LATE1(1, X8, X9, X10, X11, X12, X13, X14)
	LATE256(8, X1, X2, X3, X4, X6, X7)
	LATE1(1, X8, X10, X9, X12, X13, X14, X11)
	LATE256(9, X1, X2, X4, X5, X3, X7)
	LATE1(2, X8, X9, X10, X13, X14, X11, X12)
	LATE256(10, X1, X2, X5, X6, X4, X7)
	LATE1(2, X8, X10, X9, X14, X11, X12, X13)
	LATE256(11, X1, X2, X6, X3, X5, X7)
	LATE1(2, X8, X9, X10, X11, X12, X13, X14)
	LATE256(12, X1, X2, X3, X4, X6, X7)
	LATE1(2, X8, X10, X9, X12, X13, X14, X11)
	LAST256(13, X1, X2, X4, X5, X3, X7)
	LATE1(2, X8, X9, X10, X13, X14, X11, X12)
	LAST256(14, X1, X2, X5, X6, X4, X7)
	LATE1(3, X8, X10, X9, X14, X11, X12, X13)
	END256(15, X1, X2, X6)
	LATE1(3, X8, X9, X10, X11, X12, X13, X14)
	SHA1NEXTE X12, X10
	MOVO      X8, X9
	SHA1MSG2  X12, X13
	SHA1RNDS4 $3, X10, X8
	PXOR      X12, X14
	SHA1NEXTE X13, X9
	MOVO      X8, X10
	SHA1MSG2  X13, X14
	SHA1RNDS4 $3, X9, X8
	ROUNDS1(3, X8, X10, X9, X14)
	MOVOU 0(SP), X3
	PADDD X3, X1
	MOVOU 16(SP), X4
	PADDD X4, X2
	MOVOU 48(SP), X11
	SHA1NEXTE X11, X9
	MOVOU 32(SP), X12
	PADDD X12, X8
	ADDQ  $64, SI
	ADDQ  $64, R9
	DECQ  DX
	JNZ   bothLoop
	STORE256(DI, X1, X2, X7)
	PSHUFD $0x1b, X8, X8
	MOVOU  X8, (R8)
	PEXTRD $3, X9, BX
	MOVL   BX, 16(R8)
	RET

// func two(ha, hb *[8]uint32, pa, pb *byte, blocks int)
TEXT ·two(SB), NOSPLIT, $64-40
	MOVQ ha+0(FP), DI
	MOVQ hb+8(FP), R8
	MOVQ pa+16(FP), SI
	MOVQ pb+24(FP), R9
	MOVQ blocks+32(FP), DX
	LEAQ k256<>(SB), AX
	LOAD256(DI, X1, X2, X7)
	LOAD256(R8, X8, X9, X14)

twoLoop:
	MOVOU X1, 0(SP)
	MOVOU X2, 16(SP)
	MOVOU X8, 32(SP)
	MOVOU X9, 48(SP)
	FIRST256(0, SI, X1, X2, X3)
	FIRST256(0, R9, X8, X9, X10)
	SECOND256(1, SI, X1, X2, X4, X3)
	SECOND256(1, R9, X8, X9, X11, X10)
	SECOND256(2, SI, X1, X2, X5, X4)
	SECOND256(2, R9, X8, X9, X12, X11)
	FOURTH256(3, SI, X1, X2, X6, X3, X5, X7)
	FOURTH256(3, R9, X8, X9, X13, X10, X12, X14)
	LATE256(4, X1, X2, X3, X4, X6, X7)
	LATE256(4, X8, X9, X10, X11, X13, X14)
	LATE256(5, X1, X2, X4, X5, X3, X7)
	LATE256(5, X8, X9, X11, X12, X10, X14)
	LATE256(6, X1, X2, X5, X6, X4, X7)
	LATE256(6, X8, X9, X12, X13, X11, X14)
	LATE256(7, X1, X2, X6, X3, X5, X7)
	LATE256(7, X8, X9, X13, X10, X12, X14)
	LATE256(8, X1, X2, X3, X4, X6, X7)
	LATE256(8, X8, X9, X10, X11, X13, X14)
	LATE256(9, X1, X2, X4, X5, X3, X7)
	LATE256(9, X8, X9, X11, X12, X10, X14)
	LATE256(10, X1, X2, X5, X6, X4, X7)
	LATE256(10, X8, X9, X12, X13, X11, X14)
	LATE256(11, X1, X2, X6, X3, X5, X7)
	LATE256(11, X8, X9, X13, X10, X12, X14)
	LATE256(12, X1, X2, X3, X4, X6, X7)
	LATE256(12, X8, X9, X10, X11, X13, X14)
	LAST256(13, X1, X2, X4, X5, X3, X7)
	LAST256(13, X8, X9, X11, X12, X10, X14)
	LAST256(14, X1, X2, X5, X6, X4, X7)
	LAST256(14, X8, X9, X12, X13, X11, X14)
	END256(15, X1, X2, X6)
	END256(15, X8, X9, X13)
	MOVOU 0(SP), X3
	PADDD X3, X1
	MOVOU 16(SP), X4
	PADDD X4, X2
	MOVOU 32(SP), X10
	PADDD X10, X8
	MOVOU 48(SP), X11
	PADDD X11, X9
	ADDQ  $64, SI
	ADDQ  $64, R9
	DECQ  DX
	JNZ   twoLoop
	STORE256(DI, X1, X2, X7)
	STORE256(R8, X8, X9, X14)
	RET

// Four chains: two of SHA-256 and two of SHA-1. The registers hold the states only, the messages lie in memory: for each chain
// the last four quarters at M in BX, of which the one of group g replaces the one of group g-4.

// w is the last quarter of the message, n becomes the present one.
#define STEP256(g, s, t, w, n, M) \
	MOVO        (M+16*(g&3))(BX), n; \
	SHA256MSG1  (M+16*((g+1)&3))(BX), n; \
	MOVO        w, X0; \
	PALIGNR     $4, (M+16*((g+2)&3))(BX), X0; \
	PADDD       X0, n; \
	SHA256MSG2  w, n; \
	MOVO        n, (M+16*(g&3))(BX); \
	ROUNDS256(g, s, t, n); \
	FINISH256(s, t)

#define BEGIN256(g, p, s, t, n, M) \
	READ256(g, p, n); \
	MOVO n, (M+16*g)(BX); \
	ROUNDS256(g, s, t, n); \
	FINISH256(s, t)

#define STEP1(f, g, abcd, a, b, M) \
	MOVO     (M+16*(g&3))(BX), X15; \
	SHA1MSG1 (M+16*((g+1)&3))(BX), X15; \
	PXOR     (M+16*((g+2)&3))(BX), X15; \
	SHA1MSG2 (M+16*((g+3)&3))(BX), X15; \
	MOVO     X15, (M+16*(g&3))(BX); \
	ROUNDS1(f, abcd, a, b, X15)

#define BEGIN1(g, p, abcd, a, b, M) \
	READ1(g, p, X15); \
	MOVO X15, (M+16*g)(BX); \
	ROUNDS1(0, abcd, a, b, X15)

// The first group has no state before it from which the next e comes.
#define FIRST1(p, abcd, a, b, M) \
	READ1(0, p, X15); \
	MOVO      X15, M(BX); \
	PADDD     X15, a; \
	MOVO      abcd, b; \
	SHA1RNDS4 $0, a, abcd

#define LOAD1(h, abcd, e) \
	MOVOU  (h), abcd; \
	PSHUFD $0x1b, abcd, abcd; \
	MOVL   16(h), CX; \
	PXOR   e, e; \
	PINSRD $3, CX, e

#define STORE1(h, abcd, e) \
	PSHUFD $0x1b, abcd, abcd; \
	MOVOU  abcd, (h); \
	PEXTRD $3, e, CX; \
	MOVL   CX, 16(h)

#define STEPS256(g, w1, n1, w2, n2) \
	STEP256(g, X1, X2, w1, n1, 0); \
	STEP256(g, X3, X4, w2, n2, 64)

#define STEPS1(f, g, a1, b1, a2, b2) \
	STEP1(f, g, X9, a1, b1, 128); \
	STEP1(f, g, X12, a2, b2, 192)

// func four(ha, hb *[8]uint32, ga, gb *[5]uint32, pa, pb, qa, qb *byte, blocks int)
TEXT ·four(SB), NOSPLIT, $400-72
	MOVQ ha+0(FP), DI
	MOVQ hb+8(FP), R8
	MOVQ ga+16(FP), R9
	MOVQ gb+24(FP), R10
	MOVQ pa+32(FP), SI
	MOVQ pb+40(FP), R11
	MOVQ qa+48(FP), R12
	MOVQ qb+56(FP), R13
	MOVQ blocks+64(FP), DX
	LEAQ k256<>(SB), AX
	LEAQ 15(SP), BX
	ANDQ $~15, BX
	LOAD256(DI, X1, X2, X15)
	LOAD256(R8, X3, X4, X15)
	LOAD1(R9, X9, X10)
	LOAD1(R10, X12, X13)

fourLoop:
	MOVO X1, 256(BX)
	MOVO X2, 272(BX)
	MOVO X3, 288(BX)
	MOVO X4, 304(BX)
	MOVO X9, 320(BX)
	MOVO X10, 336(BX)
	MOVO X12, 352(BX)
	MOVO X13, 368(BX)
	FIRST1(R12, X9, X10, X11, 128)
	FIRST1(R13, X12, X13, X14, 192)
	BEGIN256(0, SI, X1, X2, X5, 0)
	BEGIN256(0, R11, X3, X4, X7, 64)
	BEGIN1(1, R12, X9, X11, X10, 128)
	BEGIN1(1, R13, X12, X14, X13, 192)
	BEGIN256(1, SI, X1, X2, X6, 0)
	BEGIN256(1, R11, X3, X4, X8, 64)
	BEGIN1(2, R12, X9, X10, X11, 128)
	BEGIN1(2, R13, X12, X13, X14, 192)
	BEGIN256(2, SI, X1, X2, X5, 0)
	BEGIN256(2, R11, X3, X4, X7, 64)
	BEGIN1(3, R12, X9, X11, X10, 128)
	BEGIN1(3, R13, X12, X14, X13, 192)
	BEGIN256(3, SI, X1, X2, X6, 0)
	BEGIN256(3, R11, X3, X4, X8, 64)
	STEPS1(0, 4, X10, X11, X13, X14)
	STEPS256(4, X6, X5, X8, X7)
	STEPS1(1, 5, X11, X10, X14, X13)
	STEPS256(5, X5, X6, X7, X8)
	STEPS1(1, 6, X10, X11, X13, X14)
	STEPS256(6, X6, X5, X8, X7)
	STEPS1(1, 7, X11, X10, X14, X13)
	STEPS1(1, 8, X10, X11, X13, X14)
	STEPS256(7, X5, X6, X7, X8)
	STEPS1(1, 9, X11, X10, X14, X13)
	STEPS256(8, X6, X5, X8, X7)
	STEPS1(2, 10, X10, X11, X13, X14)
	STEPS256(9, X5, X6, X7, X8)
	STEPS1(2, 11, X11, X10, X14, X13)
	STEPS1(2, 12, X10, X11, X13, X14)
	STEPS256(10, X6, X5, X8, X7)
	STEPS1(2, 13, X11, X10, X14, X13)
	STEPS256(11, X5, X6, X7, X8)
	STEPS1(2, 14, X10, X11, X13, X14)
	STEPS256(12, X6, X5, X8, X7)
	STEPS1(3, 15, X11, X10, X14, X13)
	STEPS1(3, 16, X10, X11, X13, X14)
	STEPS256(13, X5, X6, X7, X8)
	STEPS1(3, 17, X11, X10, X14, X13)
	STEPS256(14, X6, X5, X8, X7)
	STEPS1(3, 18, X10, X11, X13, X14)
	STEPS256(15, X5, X6, X7, X8)
	STEPS1(3, 19, X11, X10, X14, X13)
	PADDD     256(BX), X1
	PADDD     272(BX), X2
	PADDD     288(BX), X3
	PADDD     304(BX), X4
	PADDD     320(BX), X9
	SHA1NEXTE 336(BX), X10
	PADDD     352(BX), X12
	SHA1NEXTE 368(BX), X13
	ADDQ      $64, SI
	ADDQ      $64, R11
	ADDQ      $64, R12
	ADDQ      $64, R13
	DECQ      DX
	JNZ       fourLoop
	STORE256(DI, X1, X2, X15)
	STORE256(R8, X3, X4, X15)
	STORE1(R9, X9, X10)
	STORE1(R10, X12, X13)
	RET
