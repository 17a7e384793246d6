#include "textflag.h"

// Two lanes of scrypt side by side. Each step of Salsa20 waits for the one before, so that the second lane fits into the gaps.
// Words are in the order in which the diagonals of a block are vectors, so that nothing but turning them is left between the steps.

// c ^= (a + b) <<< n, of both lanes; m is 32 - n.
#define STEP(a, b, c, d, e, f, n, m) \
	VPADDD a, b, X4;   \
	VPADDD d, e, X12;  \
	VPSLLD $n, X4, X5; \
	VPSLLD $n, X12, X13; \
	VPSRLD $m, X4, X4; \
	VPSRLD $m, X12, X12; \
	VPXOR  X5, c, c;   \
	VPXOR  X13, f, f;  \
	VPXOR  X4, c, c;   \
	VPXOR  X12, f, f

// The same where the processor can rotate.
#define STEPR(a, b, c, d, e, f, n, m) \
	VPADDD a, b, X4;    \
	VPADDD d, e, X12;   \
	VPROLD $n, X4, X4;  \
	VPROLD $n, X12, X12; \
	VPXOR  X4, c, c;    \
	VPXOR  X12, f, f

#define TURN(x, y, z, u, v, w, left, right) \
	VPSHUFD $left, x, x;  \
	VPSHUFD $left, u, u;  \
	VPSHUFD $0x4e, y, y;  \
	VPSHUFD $0x4e, v, v;  \
	VPSHUFD $right, z, z; \
	VPSHUFD $right, w, w

// Columns and rows.
#define DOUBLE(S) \
	S(X0, X3, X1, X8, X11, X9, 7, 25);   \
	S(X1, X0, X2, X9, X8, X10, 9, 23);   \
	S(X2, X1, X3, X10, X9, X11, 13, 19); \
	S(X3, X2, X0, X11, X10, X8, 18, 14); \
	TURN(X1, X2, X3, X9, X10, X11, 0x93, 0x39); \
	S(X0, X1, X3, X8, X9, X11, 7, 25);   \
	S(X3, X0, X2, X11, X8, X10, 9, 23);  \
	S(X2, X3, X1, X10, X11, X9, 13, 19); \
	S(X1, X2, X0, X9, X10, X8, 18, 14);  \
	TURN(X1, X2, X3, X9, X10, X11, 0x39, 0x93)

// t ^= the block at a of in and with, for one lane.
#define TAKE(in, with, a, x, y, z, w) \
	VPXOR a(in), x, x;        \
	VPXOR 16+a(in), y, y;     \
	VPXOR 32+a(in), z, z;     \
	VPXOR 48+a(in), w, w;     \
	VPXOR a(with), x, x;      \
	VPXOR 16+a(with), y, y;   \
	VPXOR 32+a(with), z, z;   \
	VPXOR 48+a(with), w, w

// t becomes the last block of in and with, whose length is AX.
#define LAST(in, with, x, y, z, w) \
	LEAQ  -64(in)(AX*1), R11;   \
	LEAQ  -64(with)(AX*1), R12; \
	VPXOR x, x, x;              \
	VPXOR y, y, y;              \
	VPXOR z, z, z;              \
	VPXOR w, w, w;              \
	TAKE(R11, R12, 0, x, y, z, w)

// t is kept at s, or what is kept there is added to it.
#define KEEP(s, x, y, z, w) \
	VMOVDQU x, s(SP);    \
	VMOVDQU y, 16+s(SP); \
	VMOVDQU z, 32+s(SP); \
	VMOVDQU w, 48+s(SP)

#define ADD(s, x, y, z, w) \
	VPADDD s(SP), x, x;    \
	VPADDD 16+s(SP), y, y; \
	VPADDD 32+s(SP), z, z; \
	VPADDD 48+s(SP), w, w

#define PUT(out, x, y, z, w) \
	VMOVDQU x, (out);   \
	VMOVDQU y, 16(out); \
	VMOVDQU z, 32(out); \
	VMOVDQU w, 48(out)

// The block at a of both lanes.
#define BLOCK(S, a) \
	TAKE(SI, DX, a, X0, X1, X2, X3);      \
	TAKE(R9, R10, a, X8, X9, X10, X11);   \
	KEEP(0, X0, X1, X2, X3);              \
	KEEP(64, X8, X9, X10, X11);           \
	DOUBLE(S); DOUBLE(S); DOUBLE(S); DOUBLE(S); \
	ADD(0, X0, X1, X2, X3);               \
	ADD(64, X8, X9, X10, X11)

// scryptBlockMix of RFC 7914, section 4. BX is half of the length of a lane, CX counts pairs of blocks.
#define MIX(S) \
	MOVQ a+0(FP), AX;       \
	MOVQ b+8(FP), BX;       \
	MOVQ pairs+16(FP), CX;  \
	MOVQ 0(AX), DI;         \
	MOVQ 8(AX), SI;         \
	MOVQ 16(AX), DX;        \
	MOVQ 0(BX), R8;         \
	MOVQ 8(BX), R9;         \
	MOVQ 16(BX), R10;       \
	MOVQ CX, BX;            \
	SHLQ $6, BX;            \
	MOVQ CX, AX;            \
	SHLQ $7, AX;            \
	MOVQ AX, R11;           \
fetch:                      \
	SUBQ $64, R11;          \
	PREFETCHT0 (DX)(R11*1); \
	PREFETCHT0 (R10)(R11*1); \
	JNZ  fetch;             \
	LAST(SI, DX, X0, X1, X2, X3); \
	LAST(R9, R10, X8, X9, X10, X11); \
loop:                       \
	BLOCK(S, 0);            \
	PUT(DI, X0, X1, X2, X3); \
	PUT(R8, X8, X9, X10, X11); \
	BLOCK(S, 64);           \
	LEAQ (DI)(BX*1), R11;   \
	LEAQ (R8)(BX*1), R12;   \
	PUT(R11, X0, X1, X2, X3); \
	PUT(R12, X8, X9, X10, X11); \
	ADDQ $64, DI;           \
	ADDQ $64, R8;           \
	ADDQ $128, SI;          \
	ADDQ $128, DX;          \
	ADDQ $128, R9;          \
	ADDQ $128, R10;         \
	DECQ CX;                \
	JNZ  loop;              \
	VZEROUPPER;             \
	RET

// func mixAVX(a, b *mixing, pairs int)
TEXT ·mixAVX(SB), NOSPLIT, $128-24
	MIX(STEP)

// func mixAVX512(a, b *mixing, pairs int)
TEXT ·mixAVX512(SB), NOSPLIT, $128-24
	MIX(STEPR)
