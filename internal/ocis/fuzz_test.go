package ocis_test

import (
	"bytes"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/internal/ocis"
)

func FuzzParseMPK(f *testing.F) {
	for _, seed := range [][]byte{realFile, realFolder, realRevision, realRoot, nil, {0x80}, {0xde, 0xff, 0xff}, {0xdf, 0xff, 0xff, 0xff, 0xff},
		[]byte("\x81\xa1k\xc6\xff\xff\xff\xffv"), realFile[:len(realFile)/2]} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		attrs, err := ocis.ParseMPK(data)
		pairs := 0
		scanErr := ocis.ScanMPK(data, func(_, _ []byte) error { pairs++; return nil })
		if (err == nil) != (scanErr == nil) {
			// ParseMPK refuses at once what promises more than it can hold.
			t.Fatalf("ParseMPK: %v, ScanMPK: %v", err, scanErr)
		}
		_, _ = ocis.ParseNode("", data)
		if err != nil {
			return
		}
		if pairs != len(attrs) {
			t.Fatalf("%d pairs scanned, %d parsed", pairs, len(attrs))
		}
		again, err := ocis.ParseMPK(ocis.EncodeMPK(attrs))
		if err != nil || len(again) != len(attrs) {
			t.Fatalf("written again: %v, %d attributes of %d", err, len(again), len(attrs))
		}
		for i := range attrs {
			if attrs[i].Key != again[i].Key || !bytes.Equal(attrs[i].Value, again[i].Value) {
				t.Fatalf("attribute %d differs when written again", i)
			}
		}
		_, _ = ocis.ParseIndex(data)
	})
}

func FuzzParseGrant(f *testing.F) {
	f.Add("grant.u:056fc874-dd7f-11ef-ba84-af6fca4b7289", []byte("\x00t=A:f=:p=txrwaduUq:c=b1f74ec4-dd7e-11ef-a543-03775734d0f7:e=0\n"))
	f.Add("grant.g:x", []byte("\x00t=D:f=g:p=O:c=\"a:b\":e=1900000000000000000\n"))
	f.Add("grant.", []byte{})
	f.Fuzz(func(t *testing.T, name string, value []byte) {
		g, err := ocis.ParseGrant(name, value)
		if err != nil {
			return
		}
		n, v := g.Attribute()
		again, err := ocis.ParseGrant(n, v)
		if err != nil {
			t.Fatalf("%+v written as %q %q: %v", g, n, v, err)
		}
		// CSV turns \r\n inside a field into \n.
		if n != name || again.Group != g.Group || again.Deny != g.Deny || !again.Expires.Equal(g.Expires) {
			t.Fatalf("%+v comes back as %+v", g, again)
		}
	})
}

func FuzzParseTrashInfo(f *testing.F) {
	f.Add([]byte("[Trash Info]\nPath=Round 1/deleted.txt\nDeletionDate=2026-11-22T06:40:12"))
	f.Add([]byte("[Trash Info]\nDeletionDate=2026-11-22T06:40:12\nPath=x\n"))
	f.Add([]byte("[Trash Info]\nPath=\nDeletionDate="))
	f.Add([]byte("[Trash Info]\nPath=a\nPath=b\nDeletionDate=\nDeletionDate=2026-11-22T06:40:12\r\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		i, err := ocis.ParseTrashInfo(data)
		if err == nil && i.Path == "" {
			t.Fatal("an empty path was accepted")
		}
		_, _ = i.Time(time.UTC)
	})
}

func FuzzClassifyNodeName(f *testing.F) {
	for _, s := range []string{"-8dfe-4162-9c4f-000000000000", "-x.REV.2023-11-14T22:46:40Z.1.mpk", "-x.T.2023-11-14T22:46:40Z", ".-x.mpk12", ".REV.", ".mpk"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		kind, rest, stamp := ocis.ClassifyNodeName(name)
		if kind >= ocis.NameTemp {
			return
		}
		var mark string
		switch kind.Base() {
		case ocis.NameRevision:
			mark = ".REV." + stamp
		case ocis.NameTrashed:
			mark = ".T." + stamp
		}
		suffix := [...]string{"", ".mpk", ".mlock", ".lock", ".flock"}[kind-kind.Base()]
		if rest+mark+suffix != name {
			t.Fatalf("%q was taken apart as %v %q %q", name, kind, rest, stamp)
		}
	})
}

func FuzzParseUpload(f *testing.F) {
	f.Add([]byte(`{"ID":"x","Size":5,"SizeIsDeferred":false,"Offset":0,"MetaData":{"filename":"a"},"IsPartial":false,"Storage":{"SpaceRoot":"s"}}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		u, err := ocis.ParseUpload(data)
		if err == nil && u.ID == "" {
			t.Fatal("a session without an id was accepted")
		}
	})
}
