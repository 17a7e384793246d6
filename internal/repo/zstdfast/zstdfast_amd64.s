#include "textflag.h"

// The position i of those at DI, where v is its number: R12 is the last one with its hash, which is remembered in at. The bit says that
// the bytes are the same; the next one is 0.
#define POSITION(i, v) \
	MOVQ  i(DI), AX \
	MOVQ  AX, BX \
	IMULQ R10, AX \
	SHRQ  CX, AX \
	MOVL  (R8)(AX*4), R12 \
	MOVL  v, (R8)(AX*4) \
	XORQ  (SI)(R12*1), BX \
	MOVL  R12, (i*4)(R9) \
	SHLQ  $16, BX \
	CMPQ  BX, $1 \
	RCRQ  $1, R11 \
	SHRQ  $1, R11

// The position i, which is only remembered.
#define REMEMBER(i, v) \
	MOVQ  i(DI), AX \
	IMULQ R10, AX \
	SHRQ  CX, AX \
	MOVL  v, (R8)(AX*4)

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
	LEAL 1(DX), R14
	LEAL 2(DX), R15
	POSITION(0, DX)
	REMEMBER(1, R14)
	POSITION(2, R15)
	LEAL 5(DX), R14
	LEAL 6(DX), R15
	ADDL $4, DX
	POSITION(4, DX)
	REMEMBER(5, R14)
	POSITION(6, R15)
	ADDL $4, DX
	ADDQ $8, DI
	ADDQ $32, R9
	DECQ R13
	JNE  loop
	MOVQ R11, ret+40(FP)
	RET

// Writes what the state x loses by the next code, which is at code(SI), and makes the next state of it.
#define STATE(x, code, table) \
	MOVBLZX code(SI), AX \
	MOVQ    4(table)(AX*8), AX \
	MOVL    AX, BX \
	SHRQ    $32, AX \
	ADDL    x, BX \
	SHRL    $16, BX \
	BZHIQ   BX, x, DX \
	SHRXL   BX, x, x \
	ADDL    AX, x \
	MOVWLZX 516(table)(x*2), x \
	SHLXQ   R9, DX, DX \
	ORQ     DX, R8 \
	ADDQ    BX, R9

#define FLUSH \
	MOVQ  R8, (DI) \
	MOVL  R9, BX \
	MOVL  R9, DX \
	ANDL  $56, BX \
	SHRL  $3, DX \
	SHRXQ BX, R8, R8 \
	ADDQ  DX, DI \
	ANDL  $7, R9

// func writeBMI2(w *bitWriter, seqs *sequence, n int, lt, ot, mt *table)
TEXT ·writeBMI2(SB), NOSPLIT, $0-48
	MOVQ w+0(FP), AX
	MOVQ seqs+8(FP), SI
	MOVQ n+16(FP), CX
	MOVQ lt+24(FP), R13
	MOVQ ot+32(FP), R14
	MOVQ mt+40(FP), R15
	MOVQ 0(AX), DI
	MOVQ 8(AX), R8
	MOVQ 16(AX), R9
	MOVL 24(AX), R10
	MOVL 28(AX), R11
	MOVL 32(AX), R12
	MOVQ CX, AX
	SHLQ $4, AX
	ADDQ AX, SI

next:
	SUBQ    $16, SI
	STATE(R11, 10, R14)
	STATE(R12, 11, R15)
	STATE(R10, 9, R13)
	FLUSH
	SHLXQ   R9, (SI), AX
	MOVBLZX 8(SI), BX
	ORQ     AX, R8
	ADDQ    BX, R9
	FLUSH
	DECQ    CX
	JNE     next
	MOVQ w+0(FP), AX
	MOVQ DI, 0(AX)
	MOVQ R8, 8(AX)
	MOVQ R9, 16(AX)
	MOVL R10, 24(AX)
	MOVL R11, 28(AX)
	MOVL R12, 32(AX)
	RET

// func encodeBMI2(seqs *sequence, matches *match, n int, counts *[3][maxSymbols]uint32)
TEXT ·encodeBMI2(SB), NOSPLIT, $0-32
	MOVQ seqs+0(FP), DI
	MOVQ matches+8(FP), SI
	MOVQ n+16(FP), CX
	MOVQ counts+24(FP), R8
	LEAQ ·litCodes(SB), R9
	LEAQ ·matchCodes(SB), R10
	LEAQ ·litBits(SB), R11
	LEAQ ·matchBits(SB), R12

next:
	MOVL    (SI), AX
	MOVL    4(SI), BX
	MOVL    8(SI), DX
	CMPL    AX, $64
	JAE     manyLiterals
	MOVBLZX (R9)(AX*1), R13

literals:
	CMPL    BX, $128
	JAE     longMatch
	MOVBLZX (R10)(BX*1), R14

match:
	LZCNTL  DX, R15
	XORL    $31, R15
	INCL    (R8)(R13*4)
	INCL    256(R8)(R15*4)
	INCL    512(R8)(R14*4)
	MOVB    R13, 9(DI)
	MOVB    R15, 10(DI)
	MOVB    R14, 11(DI)
	MOVBLZX (R11)(R13*1), R13
	MOVBLZX (R12)(R14*1), R14
	BZHIL   R13, AX, AX
	BZHIL   R14, BX, BX
	BZHIL   R15, DX, DX
	SHLXQ   R13, BX, BX
	ADDL    R14, R13
	SHLXQ   R13, DX, DX
	ADDL    R15, R13
	ORQ     BX, AX
	ORQ     DX, AX
	MOVB    R13, 8(DI)
	MOVQ    AX, (DI)
	ADDQ    $12, SI
	ADDQ    $16, DI
	DECQ    CX
	JNE     next
	RET

manyLiterals:
	LZCNTL AX, R13
	NEGL   R13
	ADDL   $50, R13
	JMP    literals

longMatch:
	LZCNTL BX, R14
	NEGL   R14
	ADDL   $67, R14
	JMP    match

// func chooseBMI2(w *walk)
TEXT ·chooseBMI2(SB), NOSPLIT, $0-8
	MOVQ w+0(FP), R15
	MOVQ 0(R15), SI   // base
	MOVQ 16(R15), DI  // literals
	MOVQ 24(R15), R8  // matches
	MOVQ 32(R15), R9  // anchor
	MOVQ 40(R15), R10 // p
	MOVQ 48(R15), R11 // found
	MOVL 64(R15), R14 // recent

next:
	TESTQ  R11, R11
	JEQ    done
	TZCNTQ R11, AX
	BLSRQ  R11, R11
	MOVQ   8(R15), BX
	MOVL   (BX)(AX*4), BX
	ADDQ   R10, AX
	MOVQ   AX, CX
	SUBQ   BX, CX
	LEAQ   -1(CX), DX
	CMPQ   DX, $0xfffff
	JAE    next
	LEAQ   1(SI)(AX*1), DX
	MOVQ   (DX), R12
	SUBQ   R14, DX
	XORQ   (DX), R12
	SHLQ   $16, R12
	JEQ    again

found:
	// The match: position AX, candidate BX, distance CX, end R12.
	LEAQ   6(AX), R12
	MOVQ   (SI)(R12*1), DX
	XORQ   6(SI)(BX*1), DX
	JEQ    long
	TZCNTQ DX, DX
	SHRQ   $3, DX
	ADDQ   DX, R12

extended:
	CMPQ    BX, $8
	JCS     front
	MOVQ    -8(SI)(AX*1), DX
	XORQ    -8(SI)(BX*1), DX
	LZCNTQ  DX, DX
	SHRQ    $3, DX
	MOVQ    AX, R13
	SUBQ    R9, R13
	CMPQ    R13, DX
	CMOVQCS R13, DX
	SUBQ    DX, AX

front:
	// Literals: from R9 on, R13 of them.
	MOVQ  AX, R13
	SUBQ  R9, R13
	ADDQ  SI, R9
	MOVOU (R9), X0
	MOVOU X0, (DI)
	CMPQ  R13, $16
	JHI   many

copied:
	ADDQ R13, DI
	MOVL R13, (R8)
	MOVQ R12, R9
	SUBQ AX, R12
	SUBL $3, R12
	MOVL R12, 4(R8)
	CMPL CX, R14
	JEQ  same

differs:
	MOVL CX, R14
	ADDL $3, CX

stored:
	MOVL  CX, 8(R8)
	ADDQ  $12, R8
	MOVQ  R9, DX
	SUBQ  R10, DX
	CMPQ  DX, $64
	JCC   done
	MOVQ  $-1, AX
	SHLXQ DX, AX, AX
	ANDQ  AX, R11
	JMP   next

again:
	INCQ AX
	MOVQ R14, CX
	MOVQ AX, BX
	SUBQ CX, BX
	JMP  found

same:
	TESTQ R13, R13
	JEQ   differs
	MOVL  $1, CX
	JMP   stored

long:
	ADDQ $8, R12

eight:
	LEAQ   8(R12), DX
	CMPQ   DX, 56(R15)
	JHI    one
	MOVQ   R12, R13
	SUBQ   CX, R13
	MOVQ   (SI)(R12*1), DX
	XORQ   (SI)(R13*1), DX
	JEQ    long
	TZCNTQ DX, DX
	SHRQ   $3, DX
	ADDQ   DX, R12
	JMP    extended

one:
	CMPQ R12, 56(R15)
	JCC  extended
	MOVQ R12, R13
	SUBQ CX, R13
	MOVB (SI)(R12*1), DX
	CMPB DX, (SI)(R13*1)
	JNE  extended
	INCQ R12
	JMP  one

many:
	MOVQ $16, DX

sixteen:
	MOVOU (R9)(DX*1), X0
	MOVOU X0, (DI)(DX*1)
	ADDQ  $16, DX
	CMPQ  DX, R13
	JCS   sixteen
	JMP   copied

done:
	MOVQ DI, 16(R15)
	MOVQ R8, 24(R15)
	MOVQ R9, 32(R15)
	MOVL R14, 64(R15)
	RET

// Adds the code of the byte at i(SI).
#define CODE(i) \
	MOVBLZX i(SI), AX \
	MOVL    (R10)(AX*4), AX \
	MOVWLZX AX, BX \
	SHRL    $16, AX \
	SHLXQ   R9, BX, BX \
	ADDQ    AX, R9 \
	ORQ     BX, R8

// func streamBMI2(to unsafe.Pointer, p *byte, odd, fives int, t *codes) unsafe.Pointer
TEXT ·streamBMI2(SB), NOSPLIT, $0-48
	MOVQ to+0(FP), DI
	MOVQ p+8(FP), SI
	MOVQ odd+16(FP), CX
	MOVQ fives+24(FP), R11
	MOVQ t+32(FP), R10
	LEAQ (R11)(R11*4), AX
	ADDQ AX, SI
	ADDQ CX, SI
	XORL R8, R8
	XORL R9, R9
	TESTQ CX, CX
	JEQ  even

one:
	DECQ SI
	CODE(0)
	DECQ CX
	JNE  one
	FLUSH

even:
	TESTQ R11, R11
	JEQ  end

five:
	SUBQ $5, SI
	CODE(4)
	CODE(3)
	CODE(2)
	CODE(1)
	CODE(0)
	FLUSH
	DECQ R11
	JNE  five

end:
	BTSQ R9, R8
	ADDQ $8, R9
	FLUSH
	MOVQ DI, ret+40(FP)
	RET
