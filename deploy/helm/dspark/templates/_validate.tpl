{{- define "dspark.validate" -}}
{{- end -}}
