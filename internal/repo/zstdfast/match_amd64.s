#include "textflag.h"

// One position: R12 the last one with its hash, which is remembered in at; the bit says that the bytes differ.
#define POSITION(i) \
	MOVQ  i(DI), AX \
	MOVQ  AX, BX \
	IMULQ R10, AX \
	SHRQ  CX, AX \
	MOVL  (R8)(AX*4), R12 \
	MOVL  DX, (R8)(AX*4) \
	INCL  DX \
	XORQ  (SI)(R12*1), BX \
	MOVL  R12, (i*4)(R9) \
	SHLQ  $16, BX \
	NEGQ  BX \
	RCRQ  $1, R11

// func candidates64(base unsafe.Pointer, p uint, table *[1 << maxTable]uint32, at *[look]uint32, shift uint) uint64
TEXT ·candidates64(SB), NOSPLIT, $0-48
	MOVQ base+0(FP), SI
	MOVQ p+8(FP), DX
	MOVQ table+16(FP), R8
	MOVQ at+24(FP), R9
	MOVQ shift+32(FP), CX
	LEAQ (SI)(DX*1), DI
	MOVQ $(0x9E3779B185EB<<16), R10
	MOVQ $8, R13

loop:
	POSITION(0)
	POSITION(1)
	POSITION(2)
	POSITION(3)
	POSITION(4)
	POSITION(5)
	POSITION(6)
	POSITION(7)
	ADDQ $8, DI
	ADDQ $32, R9
	DECQ R13
	JNE  loop
	NOTQ R11
	MOVQ R11, ret+40(FP)
	RET
