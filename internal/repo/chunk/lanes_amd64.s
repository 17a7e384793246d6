#include "go_asm.h"
#include "textflag.h"

// One byte of each lane.
#define BYTES(i) \
	MOVBLZX (i)(SI), AX \
	MOVBLZX (const_lane+i)(SI), BX \
	MOVBLZX (2*const_lane+i)(SI), R12 \
	MOVBLZX (3*const_lane+i)(SI), R13 \
	ADDQ R8, R8 \
	ADDQ R9, R9 \
	ADDQ R10, R10 \
	ADDQ R11, R11 \
	ADDQ (DI)(AX*8), R8 \
	ADDQ (DI)(BX*8), R9 \
	ADDQ (DI)(R12*8), R10 \
	ADDQ (DI)(R13*8), R11 \
	CMPQ R8, DX \
	JCS  found \
	CMPQ R9, DX \
	JCS  found \
	CMPQ R10, DX \
	JCS  found \
	CMPQ R11, DX \
	JCS  found

// func scanLanes(p *byte, gear *[256]uint64, states *[4]uint64, limit uint64) bool
TEXT ·scanLanes(SB), NOSPLIT, $0-33
	MOVQ p+0(FP), SI
	MOVQ gear+8(FP), DI
	MOVQ states+16(FP), CX
	MOVQ limit+24(FP), DX
	MOVQ 0(CX), R8
	MOVQ 8(CX), R9
	MOVQ 16(CX), R10
	MOVQ 24(CX), R11
	LEAQ const_lane(SI), CX

next:
	BYTES(0)
	BYTES(1)
	ADDQ $2, SI
	CMPQ SI, CX
	JNE  next
	MOVQ states+16(FP), CX
	MOVQ R8, 0(CX)
	MOVQ R9, 8(CX)
	MOVQ R10, 16(CX)
	MOVQ R11, 24(CX)
	MOVB $0, ret+32(FP)
	RET

found:
	MOVB $1, ret+32(FP)
	RET
