package ocis_test

import (
	"testing"

	"github.com/holdfast-backup/holdfast/internal/ocis"
)

func BenchmarkScanMPK(b *testing.B) {
	b.SetBytes(int64(len(realFile)))
	b.ReportAllocs()
	n := 0
	for b.Loop() {
		_ = ocis.ScanMPK(realFile, func(k, v []byte) error { n += len(k) + len(v); return nil })
	}
}

func BenchmarkParseMPK(b *testing.B) {
	b.SetBytes(int64(len(realFile)))
	b.ReportAllocs()
	for b.Loop() {
		_, _ = ocis.ParseMPK(realFile)
	}
}

func BenchmarkParseNode(b *testing.B) {
	b.SetBytes(int64(len(realFile)))
	b.ReportAllocs()
	for b.Loop() {
		_, _ = ocis.ParseNode(ocis.PrefixOCIS, realFile)
	}
}

func BenchmarkEncodeMPK(b *testing.B) {
	a, err := ocis.ParseMPK(realFile)
	if err != nil {
		b.Fatal(err)
	}
	buf := make([]byte, 0, 1024)
	b.SetBytes(int64(len(realFile)))
	b.ReportAllocs()
	for b.Loop() {
		buf = ocis.AppendMPK(buf[:0], a)
	}
}

func BenchmarkClassifyNodeName(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		ocis.ClassifyNodeName("-8dfe-4162-9c4f-000000000000.REV.2023-11-14T22:46:40.123456789Z.mpk")
	}
}
